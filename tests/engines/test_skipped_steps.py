"""A step whose loss or gradient is not finite, on one rank alone: every rank skips it and continues as if it had not
happened.

The run has what lasts beside weights and moments: biases that follow the load of each step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.engines import deepspeed as deepspeed_engine
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Engine, StepResult
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.layouts.cases import LEARNING_RATE, Case, global_microbatch

deepspeed_engine.prepare()  # before the first fork

MICROBATCHES = 2
SCALE = {"loss_scale": {"initial": 1024.0, "hysteresis": 1}}  # one at which nothing overflows by itself
EP2, PP2, TP2 = {"expert_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}


def case(ranks: int, engine: str, stage: int, parallel: dict[str, Any], precision: str = "fp32",
         cached: Any = "") -> Case:  # fmt: skip
    train = {"num_microbatches": MICROBATCHES, **(SCALE if precision == "fp16" else {})}
    return Case("", ranks, engine, stage, parallel, precision, train, cached=cached)


CASES = {
    "megatron": [
        case(2, "megatron", 0, {}),
        case(2, "megatron", 1, EP2, cached="beside all"),
        case(2, "megatron", 1, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
        case(2, "megatron", 0, PP2, "bf16"),
        case(2, "megatron", 0, EP2, "fp16"),
        case(2, "megatron", 1, TP2, "fp16"),
    ],
    "deepspeed": [
        case(2, "deepspeed", 1, TP2),
        case(2, "deepspeed", 3, TP2, cached="beside all"),
        case(2, "deepspeed", 1, {**EP2, "offload_optimizer": "cpu"}),
        case(2, "deepspeed", 3, {"offload_optimizer": "cpu"}),
        case(2, "deepspeed", 2, EP2, "bf16"),
        case(2, "deepspeed", 0, {}, "fp16"),
        case(2, "deepspeed", 1, EP2, "fp16"),
        case(2, "deepspeed", 3, EP2, "fp16"),
    ],
    "4 ranks": [
        case(4, "megatron", 1, EP2),
        case(4, "megatron", 0, {**PP2, **EP2}, "fp16"),
        case(4, "deepspeed", 2, {**TP2, **EP2}),
    ],
}
MORE_CASES = {
    "more of megatron": [
        case(2, "megatron", 0, EP2),
        case(2, "megatron", 1, TP2, "bf16"),
        case(2, "megatron", 1, PP2, "fp16"),
    ],
    "more of deepspeed": [
        case(2, "deepspeed", 0, {}),
        case(2, "deepspeed", 1, EP2),
        case(2, "deepspeed", 2, EP2),
        case(2, "deepspeed", 3, EP2),
        case(2, "deepspeed", 3, {}, "fp16"),
    ],
    "more of 4 ranks": [
        case(4, "megatron", 0, EP2),
    ],
}


def step(engine: Any, number: int, spoil: bool = False) -> StepResult:
    """``spoil``: the last microbatch has a number that is none, on the data-parallel rank 0."""
    groups = engine.groups
    batches = [global_microbatch(engine.config, number * MICROBATCHES + a, groups.data_rank, groups.data_size)
               for a in range(MICROBATCHES)]  # fmt: skip
    if spoil and groups.data_rank == 0:
        batches[-1] = _spoilt(batches[-1])
    return engine.step(batches, LEARNING_RATE)


def _spoilt(batch: Batch) -> Batch:
    log_mel = batch.inputs["audio"]["log_mel"].clone()
    log_mel.view(-1)[0] = torch.nan
    audio = {**batch.inputs["audio"], "log_mel": log_mel}
    return dataclasses.replace(batch, inputs={**batch.inputs, "audio": audio})


def held(engine: Engine) -> dict[str, list[np.ndarray]]:
    """Copies of all that this rank would save."""
    return {key: [piece.float().numpy().copy() for piece in tensor.pieces.values()]
            for key, tensor in engine.export_state().items()}  # fmt: skip


def same(a: dict[str, list[np.ndarray]], b: dict[str, list[np.ndarray]]) -> bool:
    return all(np.array_equal(x, y) for key in a for x, y in zip(a[key], b[key], strict=True))


class SpoiltGradient:
    """While it is on, the gradient of this rank's last matrix of experts is not a number, if it is the last rank."""

    def __init__(self, engine: Any) -> None:
        self.on = False
        models = getattr(engine, "models", None) or [engine.model]
        experts = [p for model in models for name, p in model.named_parameters() if "experts.down" in name]
        if dist.get_rank() == dist.get_world_size() - 1:
            experts[-1].register_hook(lambda grad: grad * torch.inf if self.on else grad)


def build(case: Case, root: Path, device: torch.device) -> Any:
    config = case.config(root)
    return build_engine(config, groups_of(config.parallel, config.moe.group_sizes), device)


def spoil_a_batch_and_a_gradient(cases: list[Case], root: Path) -> list[dict[str, Any]]:
    """Steps 0, a spoilt batch, a spoilt gradient, 1; and in another engine the steps 0 and 1 alone."""
    found = []
    with process_group(timeout_minutes=1) as device:
        for case in cases:
            engine = build(case, root, device)
            gradient = SpoiltGradient(engine)
            good = [step(engine, 0)]
            before = held(engine)
            bad = [step(engine, 7, spoil=True)]
            untouched = same(before, held(engine))
            gradient.on = True
            bad.append(step(engine, 7))
            gradient.on = False
            untouched &= same(before, held(engine))
            good.append(step(engine, 1))
            progress, after = engine.progress(), held(engine)
            destroy_groups()

            other = build(case, root, device)
            undisturbed = [step(other, number) for number in range(2)]
            end = held(other)
            found.append({
                "skipped": [result.skipped for result in (*bad, *good, *undisturbed)],
                "bad": [(result.losses["total"], result.grad_norm) for result in bad],
                "good": [(result.losses["total"], result.grad_norm) for result in good],
                "undisturbed": [(result.losses["total"], result.grad_norm) for result in undisturbed],
                "untouched": untouched,
                "difference": max(float(np.abs(x - y).max(initial=0.0))
                                  for key in end for x, y in zip(after[key], end[key], strict=True)),
                "progress": progress,
                "scales": [result.loss_scale for result in (*bad, good[1])],
            })  # fmt: skip
            destroy_groups()
    return found


@pytest.mark.parametrize(
    "cases",
    [*(pytest.param(some, id=name) for name, some in CASES.items()),
     *(pytest.param(some, id=name, marks=pytest.mark.slow) for name, some in MORE_CASES.items())],
)  # fmt: skip
def test_a_bad_step_is_left_out_on_every_rank(tmp_path: Path, cases: list[Case]) -> None:
    """Nothing at all has changed after it. The steps after it are those of a run without it: only that fp16 takes
    them at a lower scale, a power of 2, which leaves alone all but what it rounds to zero or near it (2^-24)."""
    for rank in run_ranks(cases[0].ranks, spoil_a_batch_and_a_gradient, cases, tmp_path, timeout=170):
        for case, found in zip(cases, rank, strict=True):
            assert found["skipped"] == [True] * 2 + [False] * 4, case.name
            assert found["untouched"], case.name
            (spoilt_loss, norm), (loss, spoilt_norm) = found["bad"]
            assert np.isnan(spoilt_loss) and not np.isfinite(norm), case.name
            assert np.isfinite(loss) and not np.isfinite(spoilt_norm), case.name
            assert (found["progress"].steps, found["progress"].updates) == (4, 2), case.name
            fp16 = case.precision == "fp16"
            assert found["scales"] == ([1024.0, 512.0, 256.0] if fp16 else [1.0] * 3), case.name
            rtol = 1e-3 if fp16 else 1e-6
            np.testing.assert_allclose(found["good"], found["undisturbed"], rtol=rtol, err_msg=case.name)
            assert found["difference"] <= (1e-4 if fp16 else 1e-7), case.name
