"""Which layouts a search looks at, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmmoe_pretrain.plan.layouts import Choice, legal, neighbours, resolve
from tests.support import tiny_config

PARALLEL = {"engine": "megatron", "overlap_grad_reduce": True}


def test_all_layouts_of_two_ranks(tmp_path: Path) -> None:
    """2 blocks, 4 experts. One rank of data: tensor 2 with and without sequence parallelism, or pipeline 2 with one
    stage a rank; two: expert 1 or 2. Megatron has ZeRO 0 and 1, DeepSpeed 0 to 3 and no pipeline."""
    config = tiny_config(tmp_path, train={"global_batch_size": 8, "num_microbatches": 2})
    found = [candidate.choice for candidate in legal(config, 2)]
    assert len(found) == len(set(found)) == 3 * ((2 + 2) * (2 + 4) + 2)
    assert {c.engine for c in found if c.pipeline == 2} == {"megatron"}
    assert {(c.tensor, c.expert) for c in found if c.pipeline == 1} == {(1, 1), (1, 2), (2, 1)}


def test_a_layout_keeps_only_the_settings_that_its_engine_reads(tmp_path: Path) -> None:
    parallel = {"engine": "megatron", "zero_stage": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}
    config = tiny_config(tmp_path, parallel=parallel)
    first, other = Choice("megatron", 1, False, 1, 1, 1, 0, "none"), Choice("deepspeed", 1, False, 1, 1, 1, 2, "none")
    kept = first.apply(config).parallel
    assert (kept.overlap_grad_reduce, kept.overlap_param_gather) == (True, False)  # ZeRO-0 has nothing to gather
    assert not other.apply(config).parallel.overlap_grad_reduce
    assert Choice.of(config, resolve(config, first, 1).layout) == first


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"tensor": 4}, "does not divide the 2 that run"),
        ({"pipeline": 2, "engine": "deepspeed"}, "it has no pipeline"),
        ({"zero_stage": 2}, "parallel.zero_stage 2 shards gradients"),
    ],
    ids=["ranks", "engine", "ZeRO"],
)
def test_a_near_miss_has_its_reason(changed: dict[str, object], says: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, train={"global_batch_size": 8, "num_microbatches": 2})
    values = {"engine": "megatron", "tensor": 1, "sequence_parallel": False, "pipeline": 1, "virtual": 1,
              "expert": 1, "zero_stage": 1, "recompute": "none", **changed}  # fmt: skip
    with pytest.raises(ValueError, match=says):
        resolve(config, Choice(**values), 2)  # type: ignore[arg-type]


def test_neighbours_differ_in_one_degree() -> None:
    choice = Choice("megatron", 2, False, 4, 2, 2, 1, "experts")
    found = list(neighbours(choice, 16))
    keys = ("engine", "tensor", "sequence_parallel", "pipeline", "virtual", "expert", "zero_stage", "recompute")
    assert all(sum(getattr(other, key) != getattr(choice, key) for key in keys) == 1 for other in found)
    assert {other.pipeline for other in found} == {2, 4, 8}
