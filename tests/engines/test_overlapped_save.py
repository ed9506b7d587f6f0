"""A save whose copy is made as late as it may be, just before the next update of weights: the checkpoint is that of
the step of the save, bit for bit, whatever the passes between them write.

Between the save and the copy: a skipped step, the forward and backward passes of all microbatches of the next step, a
write to the balancing biases in these passes, and a temperature that the first of them brings back below its bound.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.folders import Retention
from mmmoe_pretrain.checkpoint.saver import Saver, SaveReport
from mmmoe_pretrain.checkpoint.state import ShardedState
from mmmoe_pretrain.engines import deepspeed as deepspeed_engine
from mmmoe_pretrain.engines.base import Engine
from mmmoe_pretrain.engines.deepspeed_config import updates_in_backward
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.checkpoint.support import assert_same, late_copies
from tests.distributed import run_ranks
from tests.engines.test_skipped_steps import EP2, PP2, case, step
from tests.layouts.cases import GLOBAL, Case
from tests.layouts.train import build

deepspeed_engine.prepare()  # before the first fork

ABOVE = 10.0  # any bound of a temperature
OVERLAPS = {"overlap_grad_reduce": True, "overlap_param_gather": True}
CASES = {
    "megatron": [
        case(2, "megatron", 0, {**PP2, "virtual_pipeline_size": 2}),
        case(2, "megatron", 0, EP2, "bf16"),
        case(2, "megatron", 1, {**EP2, **OVERLAPS}, cached=True),
    ],
    "deepspeed": [
        case(2, "deepspeed", 0, {}, cached=True, queue_size=4 * len(GLOBAL)),
        case(2, "deepspeed", 1, EP2),
        case(2, "deepspeed", 2, {}, "bf16"),
        case(2, "deepspeed", 3, EP2),
    ],
}
MORE_CASES = {
    "more of megatron": [
        case(2, "megatron", 0, {}, cached=True),
        case(2, "megatron", 1, OVERLAPS, "bf16"),
        case(2, "megatron", 1, PP2, "bf16"),
        case(2, "megatron", 1, EP2, "fp16"),
    ],
    "more of deepspeed": [
        case(2, "deepspeed", 3, {}, "bf16"),
        case(2, "deepspeed", 1, {**EP2, "offload_optimizer": "cpu"}),
        case(2, "deepspeed", 3, {"offload_optimizer": "cpu"}),
        case(2, "deepspeed", 2, EP2, "fp16"),
    ],
}


def balancing_biases(state: ShardedState) -> list[torch.Tensor]:
    return [piece for key, t in state.items() if ".router.bias." in key for piece in t.pieces.values()]


@contextlib.contextmanager
def write_in_every_pass(engine: Engine) -> Iterator[None]:
    """Each forward pass of a stage adds 1 to its balancing biases, equally on all ranks: no choice changes."""

    biases = balancing_biases(engine.export_state())
    hooks = [add_to(model, *biases) for model in engine.models]
    yield
    for hook in hooks:
        hook.remove()


def add_to(model: torch.nn.Module, *tensors: torch.Tensor) -> Any:
    """The hook by which every forward pass adds 1 to ``tensors``."""

    def write(*args: Any) -> None:
        for tensor in tensors:
            tensor.detach().add_(1)

    return model.register_forward_pre_hook(write)


def save(engine: Engine, saver: Saver, number: int) -> ShardedState:
    """Start to save the engine's state as step ``number``; a copy of it."""
    expected = {key: tensor.clone() for key, tensor in engine.export_state().items()}
    saver.save(number, engine.export_state(), {})
    engine.before_update(saver.wait_for_copy)
    return expected


def saves_of(engine: Engine, root: Path, group: Any) -> list[SaveReport]:
    """One before a step, and one before an older state is imported, as by a rollback. Asserts what they hold."""
    saver = Saver(root, group, Retention(last=9, every=0, best=0))
    step(engine, 0)
    old, progress = {key: tensor.clone() for key, tensor in engine.export_state().items()}, engine.progress()
    for key, tensor in old.items():
        for piece in tensor.pieces.values() if key.startswith("model/tasks.contrastive.log_scale") else ():
            piece.fill_(ABOVE)
    engine.import_state(old, progress)
    with late_copies():
        before_step = save(engine, saver, 1)
        with write_in_every_pass(engine):
            assert step(engine, 7, bad=True).skipped and not step(engine, 1).skipped
        saver.wait()
        before_import = save(engine, saver, 2)
        engine.import_state(old, progress)
        saver.close()
    for number, expected in ((1, before_step), (2, before_import)):
        checkpoint = next(c for c in store.checkpoints(root) if c.step == number)
        assert_same(store.load(checkpoint, engine.export_state(), group), expected, str(root))
    for key, tensor in before_step.items():  # the step has changed what the first copy was made of
        if key.endswith(("experts.down", "norm.weight/exp_avg")) or ".router.bias." in key:
            for at, piece in tensor.pieces.items():
                assert not torch.equal(piece, before_import[key].pieces[at]), key
    return saver.poll()


def on_a_rank(cases: list[Case], root: Path) -> list[list[SaveReport]]:
    found = []
    with process_group(timeout_minutes=1) as device:
        for number, each in enumerate(cases):
            engine = build(each, device)
            group = dist.new_group(backend="gloo", timeout=timedelta(seconds=30))
            found.append(saves_of(engine, root / f"{number}{each.name.replace(' ', '_')}", group))
            destroy_groups()
    return found


@pytest.mark.parametrize(
    "cases",
    [*(pytest.param(some, id=name) for name, some in CASES.items()),
     *(pytest.param(some, id=name, marks=pytest.mark.slow) for name, some in MORE_CASES.items())],
)  # fmt: skip
def test_a_save_that_is_copied_just_before_the_update_is_that_of_its_step(cases: list[Case], tmp_path: Path) -> None:
    for rank in run_ranks(2, on_a_rank, cases, tmp_path):
        for each, reports in zip(cases, rank, strict=True):
            assert [report.error for report in reports] == [None, None], each.name


def weights_written_by_a_pass(root: Path) -> tuple[list[bool], SaveReport]:
    with process_group(timeout_minutes=1) as device:
        with mock.patch.object(deepspeed_engine, "updates_in_backward", lambda settings: True):
            early = build(case(1, "deepspeed", 1, {}), device)
        steady = [tensor.steady for tensor in early.export_state().values()]
        destroy_groups()
        engine, saver = build(case(1, "megatron", 0, {}), device), Saver(root, None, Retention(last=1))
        with late_copies():
            save(engine, saver, 1)
            add_to(engine.models[0], engine.models[0].mmmoe.trunk.norm.weight)
            step(engine, 0)
        saver.close()
        return steady, saver.poll()[0]


def test_weights_that_a_pass_writes_are_copied_at_once_or_fail_the_save(tmp_path: Path) -> None:
    """The first where DeepSpeed's settings say so, the second by an unexpected module."""
    ((steady, report),) = run_ranks(1, weights_written_by_a_pass, tmp_path)
    assert len(steady) > 50 and not any(steady)
    assert "model/mmmoe.trunk.norm.weight changed before the update of the step" in str(report.error)
    assert store.checkpoints(tmp_path) == []


def test_the_settings_with_which_deepspeed_updates_weights_during_the_backward_pass() -> None:
    assert not updates_in_backward({"zero_optimization": {"stage": 1}})
    assert not updates_in_backward({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}})
    assert updates_in_backward({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}})
    assert updates_in_backward({"zero_optimization": {"stage": 3, "offload_optimizer": {"super_offload": True}}})
