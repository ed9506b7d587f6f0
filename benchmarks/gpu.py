"""One GPU: how much of its arithmetic whole training steps use, and their peak memory beside the plan's.

A model of about 1.1 billion active and 2.8 billion parameters (16 blocks of width 2,048, every other one an MoE layer
of 8 experts of which a token takes 2), bf16, under both engines in turn; samples are of noise and at full length, a
step takes several microbatches. DeepSpeed keeps fp32 weights beside fp32 masters, so there blocks are recomputed.
  MFU     FLOPs of the matrix products and convolutions of forward and backward pass (models/costs.py, exact at full
          length; recomputation is no use and does not count) over seconds, over the peak that the vendor states for
          dense bf16. Where that is not known, of the rate of one large product here, and the output says so.
  memory  what is held from step to step, in closed form (plan/memory.py), beside the allocator's; and the peak at all
          samples beside the line through those at a half and three quarters of them.

Prints a table and, as its last line, one JSON object. On a CPU (``--device cpu``) a tiny model runs through the
same lines: its numbers say nothing about a GPU, and ``held_vs_plan`` is not measured.

    python benchmarks/gpu.py                  two minutes on one GPU of 80 GB
    python benchmarks/gpu.py --device cpu     seconds
    python benchmarks/gpu.py --samples 20     of a microbatch, for GPUs with less memory
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.common.start_deepspeed import prepare_deepspeed
from benchmarks.layer.roofline import Machine
from benchmarks.levering.memory import peak_of
from benchmarks.stepping.workload import OBJECTIVES
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.models.costs import model_costs
from mmmoe_pretrain.parallel.degrees import resolve_degrees
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.mesh import build_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.plan.build import build
from mmmoe_pretrain.plan.machines import machine_of
from mmmoe_pretrain.plan.memory import Held, estimate_peak, held_bytes
from mmmoe_pretrain.plan.workload import full_batch

ENGINES = {"megatron": {"engine": "megatron"}, "deepspeed": {"engine": "deepspeed", "zero_stage": 2}}
RECOMPUTE = {"megatron": "none", "deepspeed": "blocks"}


@dataclass(frozen=True)
class Workload:
    """A model, and what a step takes: ``microbatches`` of ``samples`` each."""

    model: dict[str, int]
    moe: dict[str, int]
    modalities: dict[str, dict[str, Any]]
    samples: int  # a multiple of 4
    microbatches: int
    repeats: int


ON_GPU = Workload(
    {"hidden_size": 2048, "num_layers": 16, "num_heads": 16, "ffn_hidden_size": 5632, "embedding_size": 512,
     "vocab_size": 32_000},
    {"num_experts": 8, "experts_per_token": 2, "expert_hidden_size": 5632, "every": 2},
    {"image": {"kind": "image", "size": 224, "patch": 16, "stem": "linear"},
     "audio": {"kind": "audio", "stem": "linear"}, "text": {"kind": "text", "max_tokens": 64}},
    samples=28, microbatches=4, repeats=10,
)  # fmt: skip
ON_CPU = Workload(
    {"hidden_size": 64, "num_layers": 4, "num_heads": 4, "ffn_hidden_size": 128, "embedding_size": 32,
     "vocab_size": 512},
    {"num_experts": 4, "experts_per_token": 2, "expert_hidden_size": 128, "every": 2},
    {"image": {"kind": "image", "size": 32, "patch": 8, "stem": "linear"},
     "audio": {"kind": "audio", "max_seconds": 1.0, "stem": "linear"}, "text": {"kind": "text", "max_tokens": 16}},
    samples=16, microbatches=2, repeats=2,
)  # fmt: skip


def config_of(work: Workload, engine: str) -> RunConfig:
    """Contrastive pairs alone: captions would be drawn for some of the samples."""
    return run_config.parse(
        {
            "name": "gpu",
            "data": {"train": [{"path": "nowhere"}], "tokenizer": "none.model"},
            "modalities": work.modalities,
            "objectives": {"pairs": OBJECTIVES["pairs"]},
            "model": work.model,
            "moe": {**work.moe, "losses": {"balance": 0.01}},
            "parallel": ENGINES[engine],
            "train": {
                "precision": "bf16", "recompute": RECOMPUTE[engine], "num_microbatches": work.microbatches,
                "global_batch_size": work.microbatches * work.samples,
            },
        }
    )  # fmt: skip


def planned(config: RunConfig, groups: Groups | None = None) -> Held:
    """What the engine holds from step to step; from a model without memory."""
    found = build(config, 1, groups)
    return held_bytes(found.layout, found.ranks[0].parameters, config.optimizer.state)


def peak_rate(device: torch.device, given: float | None) -> tuple[float, str]:
    """FLOP/s, and its source."""
    if given is not None:
        return 1e12 * given, "given"
    if device.type == "cuda":
        machine = machine_of(torch.cuda.get_device_name(device))
        if machine is not None:
            return machine.peak["bf16"], "vendor"
    size = 8192 if device.type == "cuda" else 512
    return Machine(device).matmul_rate(torch.bfloat16, size), "measured product"


def measure(work: Workload, engine_name: str, device: torch.device, rate: float) -> dict[str, float]:
    """One engine, from its making to its end."""
    config = config_of(work, engine_name)
    groups = build_groups(resolve_degrees(config.parallel, config.moe.group_sizes, dist.get_world_size()))
    before = allocated(device)
    engine = build_engine(config, groups, device)
    half, most, whole = (full_batch(config, work.samples * n // 4) for n in (2, 3, 4))
    engine.step([whole], 1e-4)  # warms up
    seconds = []
    for _ in range(work.repeats):
        began = now(device)
        engine.step([whole] * work.microbatches, 1e-4)
        seconds.append(now(device) - began)
    plan, held = planned(config, groups).total, allocated(device) - before
    beyond = [peak_of(functools.partial(engine.step, [batch], 1e-4), device) for batch in (half, most, whole)]
    points = [(batch.num_valid, peak) for batch, peak in zip((half, most), beyond, strict=False)]
    estimate, a_token = estimate_peak(plan, points[0], points[1], whole.num_valid)
    peak = (held if device.type == "cuda" else plan) + beyond[2]
    taken = statistics.median(seconds)
    found = {
        "mfu": work.microbatches * model_costs(config).training * whole.num_valid / taken / rate,
        "tokens_per_second": work.microbatches * whole.num_valid / taken,
        "ms_a_step": 1e3 * taken,
        "held_planned_gb": plan / 1e9,
        "peak_gb": peak / 1e9,
        "peak_vs_plan": peak / estimate,
        "activation_mb_a_token": a_token / 1e6,
    }
    if device.type == "cuda":
        found["held_vs_plan"] = held / plan
    del engine
    gc.collect()
    destroy_groups()
    return found


def allocated(device: torch.device) -> int:
    """Bytes; of a CPU nothing is known."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Measure both engines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.device_count() else "cpu")
    parser.add_argument("--peak-tflops", type=float, help="of dense bf16, for a GPU that is not in the table")
    parser.add_argument("--samples", type=int, help="of a microbatch, a multiple of 4")
    parser.add_argument("--quick", action="store_true", help="two repeats")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu runs a tiny model through the same lines")
    work = ON_CPU if args.device == "cpu" else ON_GPU
    if args.quick:
        work = replace(work, repeats=2)
    if args.samples:
        work = replace(work, samples=args.samples)
    engines = list(ENGINES) if prepare_deepspeed() else ["megatron"]
    result: dict[str, Any] = {}
    with process_group(timeout_minutes=5) as device:
        rate, source = peak_rate(device, args.peak_tflops)
        for name in engines:
            found = measure(work, name, device, rate)
            print(f"{name:<10}" + "  ".join(f"{key} {value:.3g}" for key, value in found.items()))
            result |= {f"{key}_{name}": round(value, 4) for key, value in found.items()}
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(
        json.dumps(
            {
                **result,
                "peak_tflops": round(rate / 1e12, 1),
                "peak_is": source,
                "device": kind,
                "torch": torch.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
