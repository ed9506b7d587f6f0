"""One GPU under NCCL against the CPU: both engines, the same tiny run of three steps.

Run them by ``CUDA_VISIBLE_DEVICES=0 python -m pytest -m gpu tests/engines/test_gpu.py``. Without a GPU only the
first test here runs, which holds that the comparison itself works.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest

from mmmoe_pretrain.engines import deepspeed
from tests.distributed import run_ranks
from tests.engines.gpu_run import run_apart, runs
from tests.layouts.cases import STEPS
from tests.layouts.train import train_alone

FP32 = [("megatron", 0), ("megatron", 1), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
HALF = [(*kind, precision) for kind in (("megatron", 1), ("deepspeed", 2)) for precision in ("bf16", "fp16")]
# fp32 (no TF32) on either device: products of up to some hundred terms, in another order, and functions (exp, rsqrt)
# that differ in the last bit: about 1e-6 of a loss. Adam's eps of 1e-4 keeps steps from making much of it
# (tests/layouts/matrix.py). A gradient that is lost or counted twice shows in the second decimal of the norm.
LOSS, NORM = 1e-4, 1e-3
# bf16 and fp16 against fp32: 8 and 11 bits through four blocks, and single tokens that take another expert.
HALF_LOSS, HALF_NORM = 0.03, 0.15
# On a GPU other kernels round otherwise, and this run is sensitive: on a CPU, noise of half a unit in the last place
# of fp16 on what the norms return moves a loss by up to 0.047 (a token takes another expert). On an H100: 0.036.
GPU_HALF_LOSS = 0.08


def largest_differences(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    """Of a loss, relative to at least 1, and of a norm, relative."""
    losses = [
        abs(mine[name] - value) / max(1.0, abs(value))
        for mine, theirs in zip(found["losses"], expected["losses"], strict=True)
        for name, value in theirs.items()
    ]
    norms = [abs(mine / theirs - 1) for mine, theirs in zip(found["norms"], expected["norms"], strict=True)]
    return max(losses), max(norms)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By plain torch, without an engine."""
    found = train_alone(tmp_path_factory.mktemp("alone"))
    return {"losses": found.losses, "norms": found.norms}


def test_without_a_gpu_the_same_run_passes_and_half_types_are_seen(on_cpu: dict[str, Any]) -> None:
    deepspeed.prepare()  # before the fork: its import takes seconds
    ((found,),) = run_ranks(1, runs, "deepspeed", [(2, "fp32")])
    assert (found["device"], found["backend"]) == ("cpu", "gloo")
    assert len(found["losses"]) == len(found["norms"]) == STEPS
    loss, norm = largest_differences(found, on_cpu)
    assert loss <= LOSS
    assert norm <= NORM
    (halves,) = run_ranks(1, runs, "megatron", [(1, "bf16"), (1, "fp16")])
    for found in halves:
        loss, norm = largest_differences(found, on_cpu)
        assert LOSS < loss <= HALF_LOSS
        assert norm <= HALF_NORM


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
    loss, norm = largest_differences(on_gpu[engine, zero_stage, "fp32"], on_cpu)
    assert loss <= LOSS
    assert norm <= NORM


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "zero_stage", "precision"), HALF)
def test_half_types_on_the_gpu_stay_near_fp32(
    engine: str, zero_stage: int, precision: str, on_gpu: dict[Any, Any], on_cpu: dict[str, Any]
) -> None:
    found = on_gpu[engine, zero_stage, precision]
    assert all(math.isfinite(norm) for norm in found["norms"]), "no step may be left out at this loss scale"
    loss, norm = largest_differences(found, on_cpu)
    assert loss <= GPU_HALF_LOSS
    assert norm <= HALF_NORM
