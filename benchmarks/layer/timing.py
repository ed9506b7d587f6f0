"""Times implementations of one task against each other, and checks that they compute the same.

Forward and backward of the layer, in turn, one process; medians over repeats. The tokens require a
gradient, and gradients are freed before each repeat, as a training step frees them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.layer.peers import OURS, TWIN, YARDSTICK, Layer
from benchmarks.layer.workload import Task

# Relative distance of outputs and of token gradients, by norm. fp32: sums over D and F in another
# order (about sqrt(1024) roundings of 6e-8). bf16: a few roundings of 2^-9 in intermediate results,
# of logits too where a library keeps its router in bf16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SLOW = 6.0  # an implementation slower than this in the warm-up is not timed again


@dataclass(frozen=True)
class Timing:
    """Median seconds, and the distance of what was computed from ours (None for the yardstick)."""

    seconds: float
    distance: float | None

    def agrees(self, dtype: torch.dtype) -> bool:
        return self.distance is not None and self.distance <= TOLERANCE[dtype]


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|."""
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def step(layer: Layer, x_TD: Tensor, grad_TD: Tensor) -> Tensor:
    """One forward and backward pass; the output."""
    out_TD = layer(x_TD)
    out_TD.backward(grad_TD)
    return out_TD


def wall_seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def cpu_seconds(work: Callable[[], object]) -> float:
    """Of this process: what one thread would take on a machine that had nothing else to do."""
    began = time.process_time()
    work()
    return time.process_time() - began


def cuda_seconds(work: Callable[[], object]) -> float:
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1000


Clock = Callable[[Callable[[], object]], float]


def clock_for(device: torch.device, busy: bool) -> Clock:
    """``busy``: the machine is shared, so points of one thread use their own CPU time."""
    if device.type == "cuda":
        return cuda_seconds
    return cpu_seconds if busy and torch.get_num_threads() == 1 else wall_seconds


def time_layers(layers: dict[str, Layer], task: Task, repeats: int, clock: Clock) -> dict[str, Timing]:
    """``layers`` holds ours. All take a step in turn, ``repeats`` times after the one that warms up;
    of one that is ``SLOW`` the warm-up is its time."""
    x_TD = task.x_TD.clone().requires_grad_()
    outcome: dict[str, tuple[Tensor, Tensor]] = {}

    def timed(name: str, keep: bool) -> float:
        layer, results = layers[name], []
        x_TD.grad = None
        seconds = clock(lambda: results.append(step(layer, x_TD, task.grad_TD)))
        if keep and name not in (YARDSTICK, TWIN):
            assert x_TD.grad is not None
            outcome[name] = results[0].detach(), x_TD.grad
        layer.zero_grad(set_to_none=True)
        return seconds

    warm = {name: timed(name, keep=True) for name in layers}
    times = {name: [warm[name]] if warm[name] > SLOW * warm[OURS] else [] for name in layers}
    for _ in range(repeats):
        for name in layers:
            if warm[name] <= SLOW * warm[OURS]:
                times[name].append(timed(name, keep=False))
    return {
        name: Timing(statistics.median(times[name]), _furthest(outcome.get(name), outcome[OURS])) for name in layers
    }


def _furthest(found: tuple[Tensor, Tensor] | None, ours: tuple[Tensor, Tensor]) -> float | None:
    if found is None:
        return None
    return max(distance(a, b) for a, b in zip(found, ours, strict=True))
