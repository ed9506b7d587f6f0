"""The benchmark of the levers compares steps of the same samples; no timing."""

from __future__ import annotations

import pytest
import torch

from benchmarks import levers
from benchmarks.levering.measure import SAME, Row, batches, check_same
from benchmarks.levering.ranks import FAMILIES, RANKS, share_of
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.layout import resolve_layout


def pixels(batch: Batch) -> torch.Tensor:
    return batch.inputs["image"]["pixels"]


def test_microbatches_and_ranks_have_the_samples_of_the_whole() -> None:
    config = run_config.load(levers.ROOT / "configs" / "demo.yaml", levers.MODEL)
    (whole,) = batches(config, 8, 1)
    ranks = [share_of(config, 8, Groups(data_rank=rank, data_size=2)) for rank in range(2)]
    for parts in (batches(config, 8, 4), ranks):
        assert [meta.key for part in parts for meta in part.metas] == [meta.key for meta in whole.metas]
        assert sum(len(part.targets["captions"]) for part in parts) == len(whole.targets["captions"])
        assert torch.equal(torch.cat([pixels(part) for part in parts]), pixels(whole))


def row(loss: float) -> Row:
    return Row([1.0], 1, {"pairs/image-text": loss, "captions": -loss})


def test_variants_that_compute_something_else_are_refused() -> None:
    check_same(
        {"none": row(2.0), "recompute_blocks": row(2.0), "compile": row(2.0001), "accumulated": row(1)}, "none"
    )
    with pytest.raises(RuntimeError, match=r"recompute_experts computes pairs/image-text 2\.0001, none 2\.0"):
        check_same({"none": row(2.0), "recompute_experts": row(2.0001)}, "none")
    with pytest.raises(RuntimeError, match="cached"):
        check_same({"one batch": row(2.0), "cached": row(2.001)}, "one batch")


def test_levers_are_of_configs_that_can_run_and_name_a_bound() -> None:
    demo = levers.ROOT / "configs" / "demo.yaml"
    for name, lever in levers.LEVERS.items():
        resolve_layout(run_config.load(demo, [*levers.MODEL, *lever]), 1)
        assert name in ("none", *SAME)
    for family in FAMILIES:
        for name, settings in family.levers.items():
            resolve_layout(run_config.load(demo, [*levers.MODEL, *family.layout, *settings]), RANKS)
            assert name in SAME


def test_a_ratio_is_of_neighbouring_steps() -> None:
    """The machine slows down in the middle: both variants do, and their ratio does not."""
    none, lever = Row([1.0, 1.0, 9.0], 100, {}), Row([2.0, 2.0, 18.0], 50, {})
    assert levers.ratios({"none": none, "recompute_blocks": lever, "compile": lever}) == {
        "time_recompute_blocks": 2.0, "memory_recompute_blocks": 0.5, "time_compile": 2.0}  # fmt: skip
