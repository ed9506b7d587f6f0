"""Peak memory of a step of each layout on gloo ranks, beside the plan's.

Measured are the storages of all tensors that operations make from the building of the engine on (plan/live.py), at
the peak of a step after the first: weights, gradients and optimizer state included. The least of three steps, since
gloo's threads let go of a tensor at some time after its call. Batches are made before and do not count, in the plan
neither. The plan is told how unevenly tokens came to a rank in these steps.

Compiled functions allocate outside of torch's operations, and under a count of these nothing is compiled. Their
layouts are measured by the profiler's events of the allocator, which give the same peak where both can be taken: not
where ranks exchange tokens, since what gloo's threads let go of makes no event.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common.forked import on_ranks
from benchmarks.planning.layouts import Case
from benchmarks.planning.loads import Loads
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.parallel.agreement import gather_objects
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.mesh import build_groups, build_host_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.plan.activations import Imbalance
from mmmoe_pretrain.plan.build import build
from mmmoe_pretrain.plan.live import LiveTensors
from mmmoe_pretrain.plan.peak import rank_memories
from mmmoe_pretrain.plan.workload import full_batch

TIMEOUT, LEARNING_RATE = 600.0, 1e-3
STEPS = 3
STEP = "planned step"  # in the profiler's events


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
            own = _measure(case, steps, device)
            found.append(gather_objects(build_host_groups(timeout_minutes=2).control, own))
            destroy_groups()
    return found


def _measure(case: Case, steps: int, device: torch.device) -> Measured:
    config = case.config()
    groups = build_groups(resolve_layout(config, dist.get_world_size()))
    first = groups.data_rank * case.microbatches
    batches = [full_batch(config, case.samples, (first + i) * case.samples) for i in range(case.microbatches)]
    gc.collect()
    watch = Allocations() if config.train.compile == "blocks" else Tensors()
    with watch:
        engine: Any = build_engine(config, groups, device)
        loads = Loads(engine)
        engine.step(batches, LEARNING_RATE)
        imbalances = [_step(engine, loads, watch, batches) for _ in range(steps)]
    peak, imbalance = min(zip(watch.peaks(), imbalances, strict=True), key=lambda step: step[0])
    return Measured(groups.pipeline_rank, peak, imbalance)


def _step(engine: Any, loads: Loads, watch: Tensors | Allocations, batches: list[Batch]) -> Imbalance:
    loads.forget()
    gc.collect()
    with watch.step():
        engine.step(batches, LEARNING_RATE)
    return loads.imbalance(engine.config.train.recompute == "blocks")


class Tensors(LiveTensors):
    """Peaks of steps by the storages of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._peaks: list[int] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        self.reset_peak()
        yield
        self._peaks.append(self.peak)

    def peaks(self) -> list[int]:
        return self._peaks


class Allocations:
    """Peaks of steps by what torch's allocator gave and took back since the beginning."""

    def __init__(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> Self:
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)

    @contextmanager
    def step(self) -> Iterator[None]:
        with record_function(STEP):
            yield

    def peaks(self) -> list[int]:
        """In bytes, of each step in its order."""
        results: Any = self._profile.profiler.kineto_results  # type: ignore[union-attr]
        tree = list(_depth_first(results.experimental_event_tree()))
        steps = [(e.start_time_ns, e.end_time_ns) for e in tree if e.name == STEP]
        memory = [e for e in tree if e.tag == _EventType.Allocation]
        found, live, held = [0] * len(steps), 0, dict[int, int]()
        for event in sorted(memory, key=lambda event: event.start_time_ns):
            given = event.extra_fields
            live -= held.pop(given.ptr, 0)  # also where its release made no event
            if given.alloc_size > 0:
                held[given.ptr] = given.alloc_size
                live += given.alloc_size
            for number, (begin, end) in enumerate(steps):
                if begin <= event.start_time_ns <= end:
                    found[number] = max(found[number], live)
        return found


def _depth_first(events: Sequence[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _depth_first(event.children)
