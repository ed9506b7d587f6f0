"""The large point that is for a GPU: bf16, D = 4,096, F = 1,536, E = 64, K = 8, T = 16,384."""

from __future__ import annotations

import torch

from benchmarks.layer.peers import BASELINES, OURS, YARDSTICK, Dense, Layer, Ours
from benchmarks.layer.roofline import Machine, layer_flops
from benchmarks.layer.timing import clock_for, time_layers
from benchmarks.layer.workload import Point, make_task

POINT = Point(16384, 64, torch.bfloat16, top_k=8, hidden_size=4096, expert_hidden_size=1536)
RATE_SIZE = 8192  # rows and columns of the product that gives the GPU's rate


def gpu_point(machine: Machine, repeats: int, point: Point = POINT) -> dict[str, object]:
    """Ours beside plain grouped_mm and a loop, each as a share of the rate of one large product."""
    task = make_task(point, machine.device)
    layers: dict[str, Layer] = {YARDSTICK: Dense(task), OURS: Ours(task)}
    layers.update({name: build(task) for name, build in BASELINES.items()})
    timings = time_layers(layers, task, repeats, clock_for(machine.device, machine.busy))
    rate = machine.matmul_rate(point.dtype, RATE_SIZE)
    found: dict[str, object] = {"point": point.name, "matmul_tflops": round(rate / 1e12, 1)}
    print(f"{'':<12}{'ms':>9}{'TFLOP/s':>9}{'share of rate':>15}{'distance':>10}")
    for name, timing in timings.items():
        reached = layer_flops(point) / timing.seconds
        apart = "" if timing.distance is None else f"{timing.distance:.0e}"
        print(f"{name:<12}{1e3 * timing.seconds:>9.2f}{reached / 1e12:>9.1f}{reached / rate:>15.3f}{apart:>10}")
        found[f"share_{name}"] = round(reached / rate, 3)
        if name != OURS:
            found[f"vs_{name}"] = round(timing.seconds / timings[OURS].seconds, 3)
    kind = torch.cuda.get_device_name(machine.device) if machine.device.type == "cuda" else machine.device.type
    return {**found, "device": kind, "torch": torch.__version__}
