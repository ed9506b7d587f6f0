"""fp16 and its loss scale: it halves on overflow, prevents underflow, and is saved. The parity matrix compares fp16
with fp32 in every layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint.state import split_key
from mmmoe_pretrain.config import LossScaleConfig
from mmmoe_pretrain.engines import deepspeed as deepspeed_engine
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import (
    LossScale,
    Progress,
    StepResult,
    first_progress,
    next_scale,
    resumed,
)
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.layouts.cases import GLOBAL, LEARNING_RATE, config_of
from tests.layouts.train import microbatches_of
from tests.support import tiny_config

deepspeed_engine.prepare()  # before the first fork

ALONE = [("megatron", 0), ("megatron", 1), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 3)]


def engine_of(device: torch.device, engine: str, stage: int, scale: dict[str, Any], weight: float = 1.0,
              precision: str = "fp16", **parallel: Any) -> Any:  # fmt: skip
    """``weight``: of all objectives and auxiliary losses; nothing is clipped."""
    layout = {"expert_parallel_size": 1, "engine": engine, "zero_stage": stage, **parallel}
    train = {"num_microbatches": 2, "global_batch_size": 2 * len(GLOBAL), "loss_scale": scale}
    values = config_of(Path(), layout, precision, train).model_dump(mode="json")
    values["objectives"]["contrastive"]["weight"] *= weight
    values["objectives"]["captioning"]["weight"] *= weight
    values["moe"]["losses"] = {"balance": 10.0 * weight, "z": 10.0 * weight}
    values["optimizer"]["clip_norm"] = 0.0
    config = run_config.parse(values)
    return build_engine(config, groups_of(config.parallel, config.moe.group_sizes), device)


def step(engine: Any, number: int) -> StepResult:
    return engine.step(microbatches_of(engine, number), LEARNING_RATE)


def test_the_scale_halves_once_the_hysteresis_is_used_up_and_doubles_after_a_window() -> None:
    settings = LossScaleConfig(initial=8.0, minimum=2.0, window=3, hysteresis=2)
    scale, found = LossScale(8.0, 0, 2), []
    for overflow in (True, False, True, True, True, False, False, False, True, True):
        scale = next_scale(scale, overflow, settings)
        found.append((scale.scale, scale.good_steps, scale.hysteresis))
    assert found == [(8, 0, 1), (8, 1, 1), (4, 0, 1), (2, 0, 1), (2, 0, 1), (2, 1, 1), (2, 2, 1), (4, 0, 2),
                     (4, 0, 1), (2, 0, 1)]  # fmt: skip


def test_a_run_that_changes_precision_begins_or_ends_its_scale(tmp_path: Path) -> None:
    fp32, fp16 = (tiny_config(tmp_path, train={"precision": precision}).train for precision in ("fp32", "fp16"))
    scale = LossScale(2.0, 5, 1)
    assert first_progress(fp16) == Progress(0, 0, LossScale(65536.0, 0, 2))
    assert resumed(Progress(9, 8, scale), fp16) == Progress(9, 8, scale)
    assert resumed(Progress(9, 8, scale), fp32) == Progress(9, 8)
    assert resumed(Progress(9, 8), fp16) == Progress(9, 8, LossScale(65536.0, 0, 2))


def scales_from_far_above() -> list[list[tuple[float, bool, float]]]:
    found = []
    scale = {"initial": 2.0**17, "window": 2, "hysteresis": 1}
    with process_group(timeout_minutes=1) as device:
        for engine, stage in ALONE:
            running = engine_of(device, engine, stage, scale)
            results = [step(running, number) for number in range(10)]
            found.append([(result.loss_scale, result.skipped, result.losses["total"]) for result in results])
            destroy_groups()
    return found


def test_the_scale_falls_until_nothing_overflows_and_the_loss_falls() -> None:
    """The gradients of this run, whose norm is near 100, overflow fp16 at 2^17."""
    for history in run_ranks(1, scales_from_far_above)[0]:
        scale = 2.0**17
        assert history[0][1] and not all(skipped for _, skipped, _ in history)
        good = 0
        for used, skipped, loss in history:
            assert used == scale
            assert np.isfinite(loss)  # as it is, not times the scale
            good = 0 if skipped else good + 1
            scale *= 0.5 if skipped else 2.0 if good == 2 else 1.0
            good %= 2
        assert history[-1][2] < 0.9 * history[0][2]


def first_moments(engine: Any) -> dict[str, list[np.ndarray]]:
    """Of the trunk's matrices and routers: after one step a fixed part of the gradient."""
    return {split_key(key)[0]: [piece.float().numpy().copy() for piece in tensor.pieces.values()]
            for key, tensor in engine.export_state().items()
            if key.startswith("optimizer/mmmoe.trunk.") and key.endswith("/exp_avg") and tensor.pieces}  # fmt: skip


ROUTER = "mmmoe.trunk.blocks.{}.ffn.router.weight"
SMALL = 1e-6  # of the losses; most gradients in the trunk are then below what fp16 can hold (6e-8)


def small_gradients(kinds: list[tuple[str, int, str, float]], parallel: dict[str, Any]) -> list[Any]:
    found = []
    with process_group(timeout_minutes=1) as device:
        for engine, stage, precision, scale in kinds:
            running = engine_of(device, engine, stage, {"initial": scale}, SMALL, precision, **parallel)
            result = step(running, 0)
            assert not result.skipped
            found.append(first_moments(running))
            destroy_groups()
    return found


def worst_error(found: dict[str, list[np.ndarray]], expected: dict[str, list[np.ndarray]]) -> float:
    """The largest relative error of a parameter's gradient, by its norm."""
    errors = [0.0]
    for name, pieces in found.items():
        ours, theirs = (np.concatenate([piece.ravel() for piece in some]) for some in (pieces, expected[name]))
        errors.append(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)))
    return max(errors)


def test_gradients_that_would_vanish_survive_by_the_scale() -> None:
    """fp16 has 11 bits, and sums of rounded products are good to some percent; without a scale whole parameters
    get no gradient, which is an error of 1."""
    kinds = [("megatron", 0, "fp32", 1.0), *((*kind, "fp16", 2.0**24) for kind in ALONE)]
    expected, *found = run_ranks(1, small_gradients, kinds, {})[0]
    for kind, moments in zip(ALONE, found, strict=True):
        assert worst_error(moments, expected) < 0.1, kind
    unscaled = [(*kind, "fp16", 1.0) for kind in ALONE]
    for kind, moments in zip(ALONE, run_ranks(1, small_gradients, unscaled, {})[0], strict=True):
        assert worst_error(moments, expected) > 0.5, kind


def test_auxiliary_losses_of_every_pipeline_stage_are_scaled() -> None:
    """A router has most of its gradient from them. Of the four stages two have one, and one of these is the last,
    where auxiliary losses are part of the loss."""
    kinds = [("megatron", 0, "fp32", 1.0), ("megatron", 0, "fp16", 2.0**24)]
    ranks = run_ranks(2, small_gradients, kinds, {"pipeline_parallel_size": 2, "virtual_pipeline_size": 2})
    routers = [{k: v for k, v in moments.items() if k.endswith("router.weight")} for moments, _ in ranks]
    assert sorted(name for found in routers for name in found) == [ROUTER.format(block) for block in (1, 3)]
    for expected, (_, found) in zip(routers, ranks, strict=True):
        assert worst_error({name: found[name] for name in expected}, expected) < 0.1


RESUMED_AT = 2.0**14  # a scale at which some of the first steps overflow, and not all


def resume() -> list[dict[str, Any]]:
    """Four steps, and the next two of the same engine and of one that takes over its state."""
    found = []
    scale = {"initial": RESUMED_AT, "window": 3, "hysteresis": 1}
    with process_group(timeout_minutes=1) as device:
        for engine, stage in ALONE:
            first = engine_of(device, engine, stage, scale)
            for number in range(4):
                step(first, number)
            progress = Progress.from_json(first.progress().to_json())
            state = {name: held.clone() for name, held in first.export_state().items()}
            through = [step(first, number) for number in (4, 5)]
            last = first.progress()
            destroy_groups()
            second = engine_of(device, engine, stage, scale)
            second.import_state(state, progress)
            again = [step(second, number) for number in (4, 5)]
            destroy_groups()
            found.append({
                "progress": progress,
                "again": [(r.losses["total"], r.grad_norm, r.loss_scale, r.skipped) for r in again],
                "through": [(r.losses["total"], r.grad_norm, r.loss_scale, r.skipped) for r in through],
                "equal": second.progress() == last,
            })  # fmt: skip
    return found


def test_a_resumed_run_keeps_its_scale() -> None:
    for kind, found in zip(ALONE, run_ranks(1, resume)[0], strict=True):
        progress = found["progress"]
        assert progress.loss_scale.scale < RESUMED_AT and progress.steps == 4, kind
        assert 0 < progress.updates < 4, kind  # for Adam's bias correction
        assert found["again"] == found["through"], kind
        assert found["equal"], kind


@pytest.mark.parametrize("train,message", [
    ({"precision": "fp8"}, "precision"),
    ({"loss_scale": {"window": 0}}, "window"),
    ({"loss_scale": {"initial": 2.0, "minimum": 4.0}}, "initial 2 is below its minimum 4"),
])  # fmt: skip
def test_a_wrong_setting_is_refused(tmp_path: Path, train: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, train=train)
