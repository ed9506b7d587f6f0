"""Variants of one step, taken in turn: their times, peaks and first losses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.levering.memory import peak_of
from benchmarks.stepping.workload import pack_settings, random_samples
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.engines.base import Engine

# Of first losses. Recomputation comes after them; compiled and cached steps sum in another order in fp32, and so do
# tokens in chunks and the other ranks' gradients; bf16 has 8 bits of mantissa and fp16 11, through 8 blocks.
SAME = {"recompute_experts": 0.0, "recompute_blocks": 0.0, "compile": 1e-4, "cached": 1e-4, "bf16": 3e-2,
        "fp16": 5e-3, "dispatch_chunks": 1e-4, "overlap_grad_reduce": 1e-4, "overlap_both": 1e-4,
        "offload_cpu": 1e-4}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    engine: Engine
    microbatches: list[Batch]

    def step(self) -> dict[str, float]:
        return self.engine.step(self.microbatches, 1e-4).losses


@dataclass(frozen=True)
class Row:
    seconds: list[float]  # of each repeat
    peak: int  # bytes
    losses: dict[str, float]  # of the first step

    def time_against(self, other: Row) -> float:
        """Median of the ratios, each of two steps that were taken one after the other."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))


def batches(config: RunConfig, samples: int, parts: int) -> list[Batch]:
    """The same samples in ``parts`` microbatches; each sample keeps its position, and so its tasks."""
    made, settings = random_samples(config, samples, seed=samples), pack_settings(config)
    size = samples // parts
    return [pack(made[i : i + size], settings, range(i, i + size)) for i in range(0, samples, size)]


def clock_for(device: torch.device) -> Callable[[], float]:
    def cuda_clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return cuda_clock if device.type == "cuda" else time.process_time


def measure(
    variants: dict[str, Variant], repeats: int, device: torch.device, clock: Callable[[], float] | None = None
) -> dict[str, Row]:
    """The first step warms up, the last one is for memory: after a counter of operations torch runs no
    compiled function any more. ``clock``: seconds; default: of this process."""
    read = clock or clock_for(device)
    losses = {name: variant.step() for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            began = read()
            variant.step()
            seconds[name].append(read() - began)
    peaks = {name: peak_of(variant.step, device) for name, variant in variants.items()}
    return {name: Row(seconds[name], peaks[name], losses[name]) for name in variants}


def check_same(rows: dict[str, Row], yardstick: str) -> None:
    """Raise RuntimeError where a variant's contrastive losses are not those of the yardstick."""
    for name, row in rows.items():
        for loss, expected in rows[yardstick].losses.items():
            bound = SAME.get(name)
            if bound is None or not loss.startswith("pairs"):
                continue
            if abs(row.losses[loss] - expected) > bound * abs(expected):
                raise RuntimeError(f"{name} computes {loss} {row.losses[loss]!r}, {yardstick} {expected!r}")


def show(title: str, rows: dict[str, Row], yardstick: str) -> None:
    print(f"{title:<32}{'ms a step':>12}{'ratio':>8}{'peak MB':>10}{'ratio':>8}")
    base = rows[yardstick]
    for name, row in rows.items():
        print(f"{name:<32}{1e3 * statistics.median(row.seconds):>12.1f}{row.time_against(base):>8.2f}"
              f"{row.peak / 1e6:>10.1f}{row.peak / base.peak:>8.2f}")  # fmt: skip
