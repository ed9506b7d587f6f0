"""The levers that need ranks, each beside the same layout without it: two ranks, which step together.

A step's time is the wall clock of the slower rank, from a barrier on; its peak that of the rank with the larger.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.levering.measure import Row, Variant, measure
from benchmarks.stepping.workload import pack_settings, random_samples
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.parallel.degrees import resolve_degrees
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group

RANKS = 2


@dataclass(frozen=True)
class Family:
    """A layout of two ranks, and levers that change nothing of it."""

    title: str
    layout: tuple[str, ...]
    levers: dict[str, tuple[str, ...]]
    deepspeed: bool = False


EP2 = "parallel.expert_parallel_size=2"
DP2 = "parallel.expert_parallel_size=1"
FAMILIES = (
    Family("EP2", (EP2,), {"dispatch_chunks": ("moe.dispatch_chunks=2",)}),
    Family("DP2, ZeRO-1", (DP2, "parallel.zero_stage=1"), {
        "overlap_grad_reduce": ("parallel.overlap_grad_reduce=true",),
        "overlap_both": ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")}),
    Family("EP2, DeepSpeed ZeRO-2", (EP2, "parallel.zero_stage=2", "parallel.engine=deepspeed"), {
        "offload_cpu": ("parallel.offload_optimizer=cpu",)}, deepspeed=True),
)  # fmt: skip


def measure_family(family: Family, path: Path, base: list[str], samples: int, repeats: int) -> dict[str, Row]:
    """On each rank; the rows are the same on all."""
    torch.set_num_threads(1)
    with process_group(timeout_minutes=5) as device:
        config = run_config.load(path, [*base, *family.layout])
        groups = build_groups(resolve_degrees(config.parallel, config.moe.group_sizes, dist.get_world_size()))
        variants: dict[str, Variant] = {}
        held: dict[str, int] = {}  # bytes on the GPU that stay there from step to step
        for name, lever in {"none": (), **family.levers}.items():
            settings = run_config.load(path, [*base, *family.layout, *lever])
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            engine = build_engine(settings, groups, device)
            held[name] = torch.cuda.memory_allocated() - before if device.type == "cuda" else 0
            variants[name] = Variant(engine, [share_of(settings, samples, groups)])
        found = {}
        for name, row in measure(variants, repeats, device, together_clock(device)).items():
            seconds = [largest(s, device) for s in row.seconds]
            found[name] = Row(seconds, round(largest(held[name] + row.peak, device)), row.losses)
        destroy_groups()
    return found


def share_of(config: RunConfig, samples: int, groups: Groups) -> Batch:
    """This rank's part of the global batch."""
    share = samples // groups.data_size
    first = groups.data_rank * share
    made = random_samples(config, samples, seed=samples)[first : first + share]
    return pack(made, pack_settings(config), range(first, first + share))


def largest(value: float, device: torch.device) -> float:
    """Over the ranks."""
    most = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def together_clock(device: torch.device) -> Callable[[], float]:
    """Wall clock, read when all ranks are there."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        return time.perf_counter()

    return clock
