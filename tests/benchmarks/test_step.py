"""The benchmark of the training step: all that it times train the same model, and its clock adds up."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import step
from benchmarks.common.start_deepspeed import prepare_deepspeed, start_deepspeed
from benchmarks.stepping.clock import DISPATCH, EXPERTS, OPTIMIZER, PARTS, REST, Clock, mark, time_parts, timed
from benchmarks.stepping.peers import DEEPSPEED, MEGATRON
from benchmarks.stepping.workload import SIZES, Size, random_batch, step_config, valid_tokens
from mmmoe_pretrain.engines.megatron import MegatronEngine
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks

SMALL = Size(hidden_size=32, num_layers=2, every=2, num_experts=4, expert_hidden_size=16, samples=3)
NAMES = (step.OURS, MEGATRON, DEEPSPEED)


def losses_of_all_libraries() -> dict[str, list[float]]:
    with process_group(timeout_minutes=0.5) as device:
        start_deepspeed()
        config = step_config(SMALL)
        groups = groups_of(config.parallel, config.moe.num_experts)
        return step.check_same(SMALL, NAMES, groups, device)


@pytest.mark.filterwarnings("ignore")
def test_all_libraries_train_the_same_model() -> None:
    pytest.importorskip("deepspeed")
    prepare_deepspeed()
    losses = run_ranks(2, losses_of_all_libraries)[0]
    assert set(losses) == set(NAMES)
    assert len({round(value, 3) for value in losses[step.OURS]}) == len(step.CLOSE)  # each batch has its own
    for name in NAMES:
        # Sums in another order, and Adam's quotients of gradients near 0: 1e-7 was seen.
        assert losses[name] == pytest.approx(losses[step.OURS], rel=1e-5), name


def shares_and_losses() -> tuple[dict[str, float], list[float], list[float]]:
    """Shares, and the losses of an engine that is timed and of one that is not."""
    with process_group(timeout_minutes=0.5) as device:
        config = step_config(SMALL)
        groups = groups_of(config.parallel, config.moe.num_experts)
        batches = step.batches_of(config, SMALL, 3)
        _, plain = step.build(step.OURS, config, groups, device)
        _, engine = step.build(step.OURS, config, groups, device)
        assert isinstance(engine, MegatronEngine)
        clock = time_parts(engine)
        timed_losses = [engine.step([batch], 1e-2).losses["total"] for batch in batches]
        return clock.shares(), timed_losses, [plain.step([batch], 1e-2).losses["total"] for batch in batches]


@pytest.mark.filterwarnings("ignore")
def test_the_clock_finds_every_part_and_changes_no_loss() -> None:
    for shares, timed_losses, losses in run_ranks(2, shares_and_losses):
        assert math.isclose(sum(shares.values()), 1.0)
        assert set(shares) == set(PARTS) and all(share > 0 for share in shares.values()), shares
        assert shares[OPTIMIZER] > 0.02, shares  # its step, not only its zero_grad
        assert timed_losses == losses


class _Slow(torch.autograd.Function):
    """x; it takes ``seconds`` either way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


@dataclass(frozen=True)
class Carrier:
    """A value with a tensor in it, as parts exchange them."""

    x: Tensor
    note: str


def test_a_parts_backward_pass_is_charged_to_it_too_and_not_to_what_it_calls() -> None:
    clock = Clock()
    inner = timed(clock, EXPERTS, lambda x: _Slow.apply(x, 0.04))
    outer = timed(clock, DISPATCH, lambda value: Carrier(_Slow.apply(inner(_Slow.apply(value.x, 0.01)), 0.01), "b"))
    x = torch.ones(3, requires_grad=True)
    clock.restart()
    result = outer(Carrier(x, "a"))
    assert result.note == "b" and clock.part == REST
    _Slow.apply(result.x, 0.02).sum().backward()
    shares = clock.shares()
    # Sleeps of 0.04, 0.02 and 0.08 s; a busy machine sleeps longer, so only their order is sure.
    assert clock.seconds[EXPERTS] >= 0.08 and clock.seconds[DISPATCH] >= 0.04 and clock.seconds[REST] >= 0.04
    assert shares[EXPERTS] > shares[DISPATCH] and math.isclose(sum(shares.values()), 1)
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3))


def test_a_value_without_gradients_stays_the_object_it_is() -> None:
    value = (Carrier(torch.ones(2), "a"), [torch.ones(1)])
    assert mark(Clock(), DISPATCH, value) is value
    through = mark(Clock(), DISPATCH, (Carrier(torch.ones(2, requires_grad=True), "a"), 3))
    assert through[0].x.grad_fn is not None and through[0].note == "a" and through[1] == 3


def row(ours: list[float], **peers: list[float]) -> step.Row:
    return step.Row(1000, {step.OURS: ours, **peers}, dict.fromkeys(PARTS, 1 / len(PARTS)))


def test_ratios_are_medians_of_pairs_and_the_worst_point_is_named() -> None:
    rows = {
        # pairs 2, 2, 8: a repeat in which another job slowed the other library down does not count
        "small": row([1.0, 2.0, 1.0], megatron=[2.0, 4.0, 8.0], deepspeed=[3.0, 6.0, 3.0]),
        "large": row([4.0, 4.0, 4.0], megatron=[2.0, 2.0, 2.0], deepspeed=[12.0, 12.0, 12.0]),
    }
    assert rows["small"].rate(step.OURS) == 1000.0
    found = json.loads(json.dumps(step.summary(rows), allow_nan=False))
    assert (found["vs_megatron"], found["vs_deepspeed"]) == (1.0, 3.0)
    assert (found["worst"], found["worst_point"]) == (0.5, "large megatron")
    assert sum(found["shares"].values()) == pytest.approx(1, abs=1e-3) and found["sizes"] == 2
    assert found["milliseconds"]["large"] == dict.fromkeys(PARTS, 400.0)  # a tenth of 4 s each


def test_without_peers_there_is_still_a_last_line() -> None:
    found = json.loads(json.dumps(step.summary({"small": row([1.0])})))
    assert found["worst"] is None and "vs_deepspeed" not in found


def test_four_sizes_have_a_model_and_data() -> None:
    assert len({size.name for size in SIZES}) == 4
    for size in SIZES:
        config = step_config(size)
        assert config.moe.experts_per_token == 2 and config.moe.capacity_factor is None
    tokens = valid_tokens(random_batch(step_config(SMALL), 20, seed=1))
    assert 40 * 20 < tokens < 60 * 20  # "about 50 tokens" a sample
