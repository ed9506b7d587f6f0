"""Peak memory of a step of each layout on gloo ranks, beside the plan's.

Measured are the storages of all tensors that operations make from the building of the engine on (plan/live.py), at
the peak of a step after the first: weights, gradients and optimizer state included. The least of three steps, since
gloo's threads let go of a tensor at some time after its call. Batches are made before and do not count, in the plan
neither. The plan is told how unevenly tokens came to a rank in these steps.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common.forked import on_ranks
from benchmarks.planning.layouts import MICROBATCHES, Case
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.plan.activations import BALANCED, Imbalance
from mmmoe_pretrain.plan.build import build
from mmmoe_pretrain.plan.live import LiveTensors
from mmmoe_pretrain.plan.peak import rank_memories
from mmmoe_pretrain.plan.workload import full_batch

TIMEOUT, LEARNING_RATE = 600.0, 1e-3
STEPS = 3


@dataclass(frozen=True)
class Measured:
    """Of one rank."""

    pipeline_rank: int
    peak: int
    imbalance: Imbalance


@dataclass(frozen=True)
class Compared:
    """Bytes of the fullest rank of a pipeline rank."""

    case: str
    pipeline_rank: int
    planned: int
    measured: int

    @property
    def error(self) -> float:
        return abs(self.planned / self.measured - 1)


def compare(cases: Sequence[Case], steps: int = STEPS) -> list[Compared]:
    """Both engines' libraries must be imported."""
    found = []
    for ranks in sorted({case.ranks for case in cases}):
        own = [case for case in cases if case.ranks == ranks]
        measured = on_ranks(ranks, measure, own, steps, timeout=TIMEOUT)
        for case, of_ranks in zip(own, measured, strict=True):
            found += [_compared(case, stage, of_ranks) for stage in sorted({m.pipeline_rank for m in of_ranks})]
    return found


def _compared(case: Case, stage: int, of_ranks: Sequence[Measured]) -> Compared:
    fullest = max((m for m in of_ranks if m.pipeline_rank == stage), key=lambda m: m.peak)
    planned = rank_memories(build(case.config(), case.ranks), imbalance=fullest.imbalance, device="cpu")[stage]
    return Compared(case.name, stage, planned.total, fullest.peak)


def measure(cases: Sequence[Case], steps: int) -> list[list[Measured]]:
    """Of each case, every rank; on every rank of the job."""
    torch.set_num_threads(1)
    found = []
    with process_group(timeout_minutes=2) as device:
        for case in cases:
            everyone: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, _measure(case, steps, device))
            found.append(everyone)
            destroy_groups()
    return found


def _measure(case: Case, steps: int, device: torch.device) -> Measured:
    config = case.config()
    groups = build_groups(resolve_layout(config, dist.get_world_size()))
    first = groups.data_rank * MICROBATCHES
    batches = [full_batch(config, case.samples, (first + i) * case.samples) for i in range(MICROBATCHES)]
    gc.collect()
    with LiveTensors() as live:
        engine: Any = build_engine(config, groups, device)
        loads = Loads(engine)
        engine.step(batches, LEARNING_RATE)
        found = [_step(engine, loads, live, batches) for _ in range(steps)]
    return min(found, key=lambda step: step.peak)


def _step(engine: Any, loads: Loads, live: LiveTensors, batches: list[Batch]) -> Measured:
    loads.forget()
    gc.collect()
    live.reset_peak()
    engine.step(batches, LEARNING_RATE)
    peak = live.peak
    return Measured(engine.groups.pipeline_rank, peak, loads.imbalance(engine.config.train.recompute == "blocks"))


class Loads:
    """Counts of assignments at the dispatchers of a rank's MoE layers: ``sent`` to each slot, by layer and forward
    pass."""

    def __init__(self, engine: Any) -> None:
        self.groups, self.sent = engine.groups, list[list[Tensor]]()
        layers = [module for model in engine.models for module in model.modules() if isinstance(module, MoELayer)]
        for layer in layers:
            self.sent.append([])
            listening: Any = SimpleNamespace(run=self._listen(layer, self.sent[-1]))
            layer.dispatcher = listening

    def _listen(self, layer: MoELayer, sent: list[Tensor]) -> Any:
        run, slots = layer.dispatcher.run, layer.config.num_experts

        def listen(x_nD: Tensor, slots_nK: Tensor, *rest: Any) -> Any:
            sent.append(torch.bincount(slots_nK.flatten(), minlength=slots + 1)[:slots])
            return run(x_nD, slots_nK, *rest)

        return listen

    def forget(self) -> None:
        for sent in self.sent:
            sent.clear()

    def imbalance(self, of_one_layer: bool) -> Imbalance:
        """Of the microbatch and, if ``of_one_layer``, the layer in which most came to this rank; else the mean of its
        layers, whose activations are kept together."""
        if not self.sent:
            return BALANCED
        came = [torch.stack(sent) for sent in self.sent]  # [passes, slots]
        ranks, rank = self.groups.expert_size, self.groups.expert_rank
        if ranks > 1:
            for counts in came:
                dist.all_reduce(counts, group=self.groups.expert)
        own = torch.stack([counts.chunk(ranks, dim=1)[rank] for counts in came]).double()  # [layers, passes, slots]
        even = torch.stack(came).double().mean(-1)  # of a slot
        of_rank = own.mean(-1) / even
        of_rank = of_rank.amax(0) if of_one_layer else of_rank.mean(0)
        return Imbalance(float(of_rank.max()), float((own.amax(-1) / even).max()))
