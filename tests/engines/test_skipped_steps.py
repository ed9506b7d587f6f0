"""A step whose loss or gradient is not finite, on one rank alone: every rank skips it and continues as if it had not
happened.

The run has what lasts beside weights and moments: biases that follow the load of each step.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.engines import deepspeed as deepspeed_engine
from mmmoe_pretrain.engines.base import Engine, StepResult
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks
from tests.layouts.cases import GLOBAL, HOLD, LEARNING_RATE, Case
from tests.layouts.matrix import LOSS, NORM
from tests.layouts.train import build, microbatches_of, reference

deepspeed_engine.prepare()  # before the first fork

SCALE = {"loss_scale": {"initial": 1024.0, "hysteresis": 1}}  # one at which nothing overflows by itself
EP2, PP2, TP2 = {"expert_parallel_size": 2}, {"pipeline_parallel_size": 2}, {"tensor_parallel_size": 2}


def case(ranks: int, engine: str, stage: int, parallel: dict[str, Any], precision: str = "fp32",
         optimizer: dict[str, Any] | None = None, **contrastive: Any) -> Case:  # fmt: skip
    """``contrastive``: settings of that objective."""
    train = {"num_microbatches": 2, "global_batch_size": 2 * len(GLOBAL), **(SCALE if precision == "fp16" else {})}
    return Case("", ranks, engine, stage, parallel, precision, train, contrastive, optimizer=optimizer or {})


CASES = {
    "megatron": [
        case(2, "megatron", 0, {}),
        case(2, "megatron", 1, EP2, optimizer=HOLD, cached=True, queue_size=4 * len(GLOBAL)),
        case(2, "megatron", 1, {"overlap_grad_reduce": True, "overlap_param_gather": True}),
        case(2, "megatron", 0, PP2, "bf16"),
        case(2, "megatron", 0, EP2, "fp16"),
        case(2, "megatron", 1, TP2, "fp16"),
    ],
    "deepspeed": [
        case(2, "deepspeed", 1, TP2, optimizer=HOLD),
        case(2, "deepspeed", 3, {**TP2, "offload_optimizer": "cpu"}, optimizer=HOLD, cached=True),
        case(2, "deepspeed", 1, {**EP2, "offload_optimizer": "cpu"}),
        case(2, "deepspeed", 2, EP2, "bf16"),
        case(2, "deepspeed", 0, {}, "fp16"),
        case(2, "deepspeed", 1, EP2, "fp16"),
        case(2, "deepspeed", 3, EP2, "fp16"),
    ],
    "4 ranks": [
        case(4, "megatron", 0, {**PP2, **EP2}, "fp16"),
        case(4, "deepspeed", 2, {**TP2, **EP2}),
    ],
}
MORE_CASES = {
    "more": [
        case(2, "megatron", 0, EP2),
        case(2, "megatron", 1, TP2, "bf16"),
        case(2, "megatron", 1, PP2, "fp16"),
        case(2, "deepspeed", 0, {}, optimizer=HOLD),
        case(2, "deepspeed", 1, EP2),
        case(2, "deepspeed", 2, EP2),
        case(2, "deepspeed", 3, EP2),
        case(2, "deepspeed", 3, TP2, cached=True),
        case(2, "deepspeed", 3, {"offload_optimizer": "cpu"}),
        case(2, "deepspeed", 3, {}, "fp16"),
    ],
    "more of 4 ranks": [
        case(4, "megatron", 0, EP2),
        case(4, "megatron", 1, EP2),
    ],
}


def step(engine: Engine, number: int, bad: bool = False) -> StepResult:
    """``bad``: the last microbatch has a NaN, on the data-parallel rank 0."""
    batches = microbatches_of(engine, number)
    if bad and engine.groups.data_rank == 0:
        batches[-1] = _with_nan(batches[-1])
    return engine.step(batches, LEARNING_RATE)


def _with_nan(batch: Batch) -> Batch:
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


def difference(a: dict[str, list[np.ndarray]], b: dict[str, list[np.ndarray]]) -> float:
    return max(float(np.abs(x - y).max(initial=0.0)) for key in a for x, y in zip(a[key], b[key], strict=True))


class InfiniteGradient:
    """While it is on, the gradient of this rank's last matrix of experts is not a number, if it is the last rank."""

    def __init__(self, engine: Engine) -> None:
        self.on = False
        experts = [p for model in engine.models for name, p in model.named_parameters() if "experts.down" in name]
        if dist.get_rank() == dist.get_world_size() - 1:
            experts[-1].register_hook(lambda grad: grad * torch.inf if self.on else grad)


def a_bad_batch_and_a_bad_gradient(cases: list[Case]) -> list[dict[str, Any]]:
    """Steps 0, a batch with NaN, an infinite gradient, 1; and 1 again from the state before it, which no bad step
    precedes."""
    found = []
    with process_group(timeout_minutes=1) as device:
        for case in cases:
            engine = build(case, device)
            gradient = InfiniteGradient(engine)
            good = [step(engine, 0)]
            before = held(engine)
            bad = [step(engine, 7, bad=True)]
            untouched = same(before, held(engine))
            gradient.on = True
            bad.append(step(engine, 7))
            gradient.on = False
            untouched &= same(before, held(engine))
            state = {key: tensor.clone() for key, tensor in engine.export_state().items()}
            progress = engine.progress()
            good.append(step(engine, 1))
            after = held(engine)
            engine.import_state(state, progress)
            again = step(engine, 1)
            found.append({
                "bad": [(result.skipped, result.losses["total"], result.grad_norm) for result in bad],
                "good": [(result.skipped, result.losses["total"], result.grad_norm) for result in (*good, again)],
                "untouched": untouched,
                "difference": difference(after, held(engine)),
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
def test_a_bad_step_is_left_out_on_every_rank(cases: list[Case]) -> None:
    """Nothing at all has changed after it, and the step after it is that of a run without it: of the same state given
    anew, and in fp32 of one process."""
    for rank in run_ranks(cases[0].ranks, a_bad_batch_and_a_bad_gradient, cases, timeout=170):
        for case, found in zip(cases, rank, strict=True):
            (skipped, nan_loss, norm), (skipped_too, loss, infinite_norm) = found["bad"]
            assert skipped and np.isnan(nan_loss) and not np.isfinite(norm), case.name
            assert skipped_too and np.isfinite(loss) and not np.isfinite(infinite_norm), case.name
            assert found["untouched"], case.name
            assert (found["progress"].steps, found["progress"].updates) == (3, 1), case.name
            scales = [1024.0, 512.0, 256.0] if case.precision == "fp16" else [1.0] * 3
            assert found["scales"] == scales, case.name
            first, second, again = found["good"]
            assert not any(skipped for skipped, _, _ in found["good"]), case.name
            np.testing.assert_allclose(second, again, rtol=1e-6, err_msg=case.name)
            assert found["difference"] <= 1e-7, case.name
            if case.precision == "fp32":
                alone = reference(case.alone, 2)
                for number, (_, loss, norm) in enumerate((first, second)):
                    assert loss == pytest.approx(alone.losses[number]["total"], rel=LOSS["fp32"]), case.name
                    assert norm == pytest.approx(alone.norms[number], rel=NORM["fp32"]), case.name
