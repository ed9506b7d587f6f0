"""One GPU under NCCL against the CPU: both engines, the same tiny run of three steps.

Run them by ``CUDA_VISIBLE_DEVICES=0 python -m pytest -m gpu tests/engines/test_gpu.py``. Without a GPU only the
first test here runs, which holds that the comparison itself works.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import pytest

from mmmoe_pretrain.engines import deepspeed
from tests.distributed import run_ranks
from tests.engines.gpu_run import run_apart, runs
from tests.layouts.cases import ALONE, FIXED_ROUTING, STEPS
from tests.layouts.train import reference

FP32 = [("megatron", 0), ("megatron", 1), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
HALF = [(*kind, precision) for kind in (("megatron", 1), ("deepspeed", 2)) for precision in ("bf16", "fp16")]
STEPS_OF_HALF = 1
# fp32 (no TF32) on either device: products of up to some hundred terms, in another order, and functions (exp, rsqrt)
# that differ in the last bit: about 1e-6 of a loss. Adam's eps of 1e-4 keeps steps from making much of it
# (tests/layouts/matrix.py). A gradient that is lost or counted twice shows in the second decimal of the norm.
LOSS, NORM = 1e-4, 1e-3
# bf16 and fp16 against fp32: 8 and 11 bits through four blocks, in the first step and with fixed routing
# (tests/layouts/matrix.py says why). On a CPU 0.3% and 0.4% in bf16, 0.04% and 0.05% in fp16: about five times that.
HALF_BOUNDS = {"bf16": (0.02, 0.02), "fp16": (0.003, 0.003)}


def largest_differences(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    """Of a loss, relative to at least 1, and of a norm, relative; in the steps that ``expected`` has."""
    steps = range(len(expected["losses"]))
    losses = [
        abs(found["losses"][i][name] - value) / max(1.0, abs(value))
        for i in steps
        for name, value in expected["losses"][i].items()
    ]
    norms = [abs(found["norms"][i] / expected["norms"][i] - 1) for i in steps]
    return max(losses), max(norms)


@pytest.fixture(scope="module")
def on_cpu() -> dict[str, dict[str, Any]]:
    """By plain torch in fp32, without an engine: what each type is compared with."""
    hashed = dataclasses.replace(ALONE, moe=FIXED_ROUTING)
    alone = {"fp32": reference(ALONE, STEPS), "half": reference(hashed, STEPS_OF_HALF)}
    return {name: {"losses": found.losses, "norms": found.norms} for name, found in alone.items()}


def test_without_a_gpu_the_same_run_passes_and_half_types_are_seen(on_cpu: dict[str, Any]) -> None:
    deepspeed.prepare()  # before the fork: its import takes seconds
    ((found,),) = run_ranks(1, runs, "deepspeed", [(2, "fp32")])
    assert (found["device"], found["backend"]) == ("cpu", "gloo")
    assert len(found["losses"]) == len(found["norms"]) == STEPS
    loss, norm = largest_differences(found, on_cpu["fp32"])
    assert loss <= LOSS
    assert norm <= NORM
    (halves,) = run_ranks(1, runs, "megatron", [(1, precision) for precision in HALF_BOUNDS])
    for found, (most_loss, most_norm) in zip(halves, HALF_BOUNDS.values(), strict=True):
        loss, norm = largest_differences(found, on_cpu["half"])
        assert LOSS < loss <= most_loss
        assert norm <= most_norm


@pytest.fixture(scope="module")
def on_gpu() -> dict[tuple[str, int, str], dict[str, Any]]:
    """Every run, by engine, ZeRO stage and precision."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
    found = {}
    for engine in ("megatron", "deepspeed"):
        kinds = [(stage, "fp32") for name, stage in FP32 if name == engine]
        kinds += [(stage, precision) for name, stage, precision in HALF if name == engine]
        for (stage, precision), run in zip(kinds, run_apart(engine, kinds, gpu), strict=True):
            assert (run["device"], run["backend"]) == ("cuda", "nccl")
            found[engine, stage, precision] = run
    return found


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "zero_stage"), FP32)
def test_fp32_on_the_gpu_is_fp32_on_the_cpu(
    engine: str, zero_stage: int, on_gpu: dict[Any, Any], on_cpu: dict[str, Any]
) -> None:
    loss, norm = largest_differences(on_gpu[engine, zero_stage, "fp32"], on_cpu["fp32"])
    assert loss <= LOSS
    assert norm <= NORM


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "zero_stage", "precision"), HALF)
def test_half_types_on_the_gpu_stay_near_fp32(
    engine: str, zero_stage: int, precision: str, on_gpu: dict[Any, Any], on_cpu: dict[str, Any]
) -> None:
    found = on_gpu[engine, zero_stage, precision]
    assert all(math.isfinite(norm) for norm in found["norms"]), "no step may be skipped at this loss scale"
    loss, norm = largest_differences(found, on_cpu["half"])
    most_loss, most_norm = HALF_BOUNDS[precision]
    assert loss <= most_loss
    assert norm <= most_norm
