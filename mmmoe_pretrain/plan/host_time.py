"""Measures the time that the host takes to start the operations of a block, a microbatch and a step, by steps of
models so narrow that their arithmetic takes no time.

The models have 2 and 6 blocks, dense or with experts, and a step has 1 or 3 microbatches: a step of L blocks and m
microbatches takes step + L step_block + m (microbatch + L block).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.plan.communication import FP32, dispatch, routed_of
from mmmoe_pretrain.plan.links import placed
from mmmoe_pretrain.plan.machines import Host, Machine
from mmmoe_pretrain.plan.workload import full_batch

Clock = Callable[[], float]

STEPS = 30  # of each; the shortest counts
BLOCKS, MICROBATCHES, SAMPLES = (2, 6), (1, 3), 2  # samples of a microbatch


def host_times(config: RunConfig, device: torch.device, clock: Clock) -> Host:
    """On all ranks, whose experts are all on each of them; without ``Host.dispatch``."""
    dense, sparse = (_steps(config, each, 1, device, clock) for each in (True, False))
    step_block = (dense.once[1] - dense.once[0]) / (BLOCKS[1] - BLOCKS[0])
    return Host(
        dense_block=max(0.0, dense.block),
        moe_block=max(0.0, sparse.block),
        microbatch=max(0.0, dense.each[0] - BLOCKS[0] * dense.block),
        step_block=max(0.0, step_block),
        step=max(0.0, dense.once[0] - BLOCKS[0] * step_block),
    )


def dispatch_time(config: RunConfig, machine: Machine, device: torch.device, clock: Clock) -> float:
    """``Host.dispatch`` with experts on all ranks: the longest of any rank. On an asynchronous device ``clock``
    counts waits for messages too, and the time that ``machine`` has for these is subtracted."""
    ranks = dist.get_world_size()
    narrow = _narrow(config, BLOCKS[0], False, ranks)
    layout, moe, tokens = resolve_layout(narrow, ranks), narrow.moe, full_batch(narrow, SAMPLES).num_valid
    routed = routed_of(moe, tokens, ranks)
    element = FP32 if config.train.precision == "fp32" else FP32 // 2
    sent = dispatch(ranks, moe.num_experts, moe.dispatch_chunks, routed, narrow.model.hidden_size * element)
    messages = sum(placed(transfer, layout, machine).seconds for transfer in sent)
    waits = messages if machine.asynchronous else 0.0
    local, remote = (_steps(config, False, each, device, clock).block for each in (1, ranks))
    return max(0.0, slowest(remote - local, device) - waits) / machine.slowed("host", ranks)


def slowest(seconds: float, device: torch.device) -> float:
    """Of all ranks."""
    value = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


@dataclass(frozen=True)
class _Steps:
    """Seconds of a microbatch and once a step, with each number of ``BLOCKS``."""

    each: list[float]
    once: list[float]

    @property
    def block(self) -> float:
        """Of a microbatch."""
        return (self.each[1] - self.each[0]) / (BLOCKS[1] - BLOCKS[0])


def _steps(config: RunConfig, dense: bool, expert_ranks: int, device: torch.device, clock: Clock) -> _Steps:
    each, once = [], []
    for blocks in BLOCKS:
        one, three = _shortest(_narrow(config, blocks, dense, expert_ranks), device, clock)
        each.append((three - one) / (MICROBATCHES[1] - MICROBATCHES[0]))
        once.append(one - MICROBATCHES[0] * each[-1])
    return _Steps(each, once)


def _shortest(narrow: RunConfig, device: torch.device, clock: Clock) -> list[float]:
    """Seconds of a step, by number of microbatches."""
    engine = build_engine(narrow, build_groups(resolve_layout(narrow, dist.get_world_size())), device)
    batch, found = full_batch(narrow, SAMPLES), []

    def timed(batches: list[Batch]) -> float:
        began = clock()
        engine.step(batches, 1e-4)
        return clock() - began

    for microbatches in MICROBATCHES:
        taken = [timed([batch] * microbatches) for _ in range(STEPS + 1)]  # as many on every rank
        found.append(min(taken[1:]))  # the first warms up
    destroy_groups()
    return found


def _narrow(config: RunConfig, blocks: int, dense: bool, expert_ranks: int) -> RunConfig:
    model = config.model.model_copy(
        update={"hidden_size": 32, "num_heads": 2, "num_kv_heads": None, "num_layers": blocks, "ffn_hidden_size": 32,
                "embedding_size": 16, "vocab_size": max(64, min(config.model.vocab_size, 256))}
    )  # fmt: skip
    experts = {"expert_hidden_size": 16, "every": 1, "layers": {}, "expert_groups": ()}
    moe = config.moe.model_copy(update={**experts, **({"num_experts": 1, "experts_per_token": 1} if dense else {})})
    parallel = type(config.parallel)(expert_parallel_size=expert_ranks)
    train = config.train.model_copy(
        update={
            "recompute": "none",
            "profile": None,
            "num_microbatches": 1,
            "global_batch_size": SAMPLES * dist.get_world_size(),
        }
    )
    return config.model_copy(update={"model": model, "moe": moe, "parallel": parallel, "train": train})
