"""A model of the step of benchmarks/gpu.py on one H100, by kernel: counted bytes and FLOPs over stated rates. Nothing
here is measured and no GPU is needed.

The kernels of a microbatch are counted on fake tensors (modelling/trace.py) for three variants: "before" (PyTorch's
norms, heads and SwiGLU, masked attention by buckets, unfused Adam: commit 226af92), "between" (Triton kernels and
fused Adam, still by buckets: the code that was timed on an H100) and "now". A step is four microbatches and the
optimizer.

  product    FLOPs over the rate of a product with that smallest dimension, or bytes over bandwidth, what is longer
  attention  FLOPs over the rate of ``varlen_attn`` at that length; by buckets longer as it was measured
  others     bytes over bandwidth, which includes gradient accumulation and the optimizer

Rates are those of plan/machines.py for the H100, with their sources there, and the same for all variants; two ratios
are from the same table of RESULTS.md. Gaps between kernels, the host and caches are left out, so a measured step is
longer: the steps that were measured are printed beside the model's. Of ``train.recompute`` the first value that fits
into 80 GB is taken, by the plan's count of bytes.

Prints tables and, as its last line, one JSON object.

    python benchmarks/gpu_model.py            a minute
    python benchmarks/gpu_model.py --quick    the step of 65,104 tokens a microbatch alone
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks import gpu
from benchmarks.modelling.trace import PARTS, Kernel, Recorder
from benchmarks.modelling.variants import BEFORE, BETWEEN, NOW, Variant
from mmmoe_pretrain.models.costs import model_costs
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.stages import whole
from mmmoe_pretrain.plan.activations import stage_memory
from mmmoe_pretrain.plan.build import build, pretended_groups
from mmmoe_pretrain.plan.communication import Parameter
from mmmoe_pretrain.plan.machines import GPUS
from mmmoe_pretrain.plan.memory import held_bytes
from mmmoe_pretrain.plan.workload import full_batch

H100 = GPUS["h100"]
SAMPLES = 208  # of 313 tokens: 65,104 of a microbatch
RECOMPUTE = ("none", "experts", "blocks")
# benchmarks/RESULTS.md, parts of a step: attention by buckets and by varlen_attn; AdamW by default and fused.
BUCKETS_OVER_VARLEN, DEFAULT_OVER_FUSED = 3.06 / 1.11, 7.07 / 2.57
FUSED_ADAM = 28  # bytes a parameter: four numbers read, three written
LEAST_SIZE = 128  # of a product, below which bytes decide and not the rate, which was not measured
SUMMED = 8  # bytes a parameter: of a gradient that is added to the sum in fp32, beside reading it
# The same table: samples of a microbatch, measured ms of a step, train.recompute
MEASURED = (
    (BEFORE, 20, 859.0, "none"),
    (BETWEEN, 20, 691.0, "none"),
    (BETWEEN, 28, 853.0, "none"),
)


@dataclass(frozen=True)
class Row:
    """Of one part of a step: kernels, bytes, FLOPs and seconds."""

    kernels: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Row) -> Row:
        return Row(
            self.kernels + other.kernels, self.bytes + other.bytes, self.flops + other.flops,
            self.seconds + other.seconds,
        )  # fmt: skip

    def __mul__(self, factor: int) -> Row:
        return Row(factor * self.kernels, factor * self.bytes, factor * self.flops, factor * self.seconds)


@dataclass(frozen=True)
class Step:
    """``items``: by (part, kernel); they sum to the step. ``useful``: the model's FLOPs, without recomputation.
    ``peak``: bytes."""

    tokens: int
    recompute: str
    items: dict[tuple[str, str], Row]
    useful: float
    peak: float

    @property
    def seconds(self) -> float:
        return sum(row.seconds for row in self.items.values())

    @property
    def mfu(self) -> float:
        return self.useful / self.seconds / H100.peak["bf16"]

    @property
    def parts(self) -> dict[str, Row]:
        rows: dict[str, Row] = defaultdict(Row)
        for (part, _), row in self.items.items():
            rows[part] += row
        return rows


def seconds_of(kernel: Kernel, variant: Variant, attended: float) -> float:
    """By the rates of the module's docstring. ``attended``: tokens that a token attends to."""
    if kernel.part == "attention":
        slower = 1.0 if variant.varlen else BUCKETS_OVER_VARLEN
        return slower * kernel.flops / H100.attention_rate("bf16", attended)
    moving = kernel.bytes / H100.streaming
    if not kernel.flops:
        return moving
    return max(moving, kernel.flops / H100.product_rate(kernel.precision, max(LEAST_SIZE, kernel.size)))


def step_of(variant: Variant, samples: int, recompute: str | None = None, work: gpu.Workload = gpu.ON_GPU) -> Step:
    """``recompute``: default is the first that fits."""
    steps = (_step(variant, samples, mode, work) for mode in ([recompute] if recompute else RECOMPUTE))
    return next(step for step in steps if recompute or step.recompute == RECOMPUTE[-1] or step.peak <= H100.memory)


def _step(variant: Variant, samples: int, recompute: str, work: gpu.Workload) -> Step:
    config = gpu.config_of(replace(work, samples=samples), "megatron")
    config = config.model_copy(update={"train": config.train.model_copy(update={"recompute": recompute})})
    batch = full_batch(config, samples)
    pairs = float(np.square(batch.attention.lengths, dtype=float).sum())
    recorder, stage = Recorder(pairs), whole(config.model.num_layers)
    with pretended_groups(resolve_layout(config, 1)) as groups:
        paths = partial(variant.paths, recorder)
        memory = stage_memory(config, groups, stage, batch, live=recorder, paths=paths).memory
    items: dict[tuple[str, str], Row] = defaultdict(Row)
    for kernel in recorder.kernels:
        key = ("recomputation", kernel.part) if kernel.phase == "recomputation" else (kernel.part, kernel.name)
        seconds = seconds_of(kernel, variant, pairs / batch.num_valid)
        items[key] += Row(1, kernel.bytes, kernel.flops, seconds)
    number = config.train.num_microbatches
    built = build(config, 1)
    parameters = [parameter for of_stage in built.ranks[0].parameters for parameter in of_stage]
    held = held_bytes(built.layout, built.ranks[0].parameters, config.optimizer.state).total
    return Step(
        batch.num_valid,
        recompute,
        {key: row * number for key, row in items.items()} | after_passes(parameters, number, variant),
        number * model_costs(config).training * batch.num_valid,
        held + max(memory.forward, memory.backward),
    )


def after_passes(parameters: Iterable[Parameter], microbatches: int, variant: Variant) -> dict[tuple[str, str], Row]:
    """What parameters take: each gradient is added to a sum in fp32 at each microbatch; and the optimizer's step."""
    sizes = [(parameter.numel, parameter.bytes) for parameter in parameters]
    added = microbatches * sum(numel * (size + SUMMED) for numel, size in sizes)
    numel = sum(numel for numel, _ in sizes)
    adam = FUSED_ADAM * (1.0 if variant.fused_adam else DEFAULT_OVER_FUSED) * numel
    others = (H100.optimizer_bytes - FUSED_ADAM) * numel
    moved = {
        ("gradient sums", "added in fp32"): added,
        ("optimizer", "AdamW"): adam,
        ("optimizer", "norm, scaling, clipping, copies"): others,
    }
    return {key: Row(0, bytes_, 0.0, bytes_ / H100.streaming) for key, bytes_ in moved.items()}


def print_parts(steps: dict[str, Step]) -> None:
    """One line a part."""
    print(f"{'':<20}" + "".join(f"{name + ': kernels':>16}{'GB':>8}{'TFLOP':>8}{'ms':>8}{'%':>6}" for name in steps))
    for part in (*PARTS, "recomputation", "gradient sums", "optimizer"):
        rows = {name: step.parts[part] for name, step in steps.items()}
        if any(row.seconds for row in rows.values()):
            columns = (_columns(row, steps[name].seconds) for name, row in rows.items())
            print(f"{part:<20}" + "".join(columns))
    totals = {name: sum(step.items.values(), Row()) for name, step in steps.items()}
    print(f"{'step':<20}" + "".join(_columns(row, row.seconds) for row in totals.values()))


def _columns(row: Row, whole_step: float) -> str:
    share = 100 * row.seconds / whole_step
    return f"{row.kernels:>16}{row.bytes / 1e9:>8.0f}{row.flops / 1e12:>8.0f}{1e3 * row.seconds:>8.1f}{share:>6.1f}"


def print_kernels(step: Step, number: int = 25) -> None:
    """The longest."""
    ordered = sorted(step.items.items(), key=lambda item: -item[1].seconds)
    for (part, name), row in ordered[:number]:
        print(f"  {part:<18}{name:<44}" + _columns(row, step.seconds))


def compare_with_measured() -> dict[str, float]:
    """Prints measured beside modelled steps; the ratios."""
    print("\nmeasured on one H100 (RESULTS.md), and modelled:")
    ratios = {}
    for variant, samples, measured, recompute in MEASURED:
        step = step_of(variant, samples, recompute)
        ratio, seconds = measured / (1e3 * step.seconds), measured / 1e3
        ratios[f"measured_over_modelled_{variant.name}_{step.tokens}"] = round(ratio, 3)
        print(
            f"  {variant.name:<8} {step.tokens} tokens: {measured:.0f} ms, "
            f"MFU {step.useful / seconds / H100.peak['bf16']:.3f}; modelled {1e3 * step.seconds:.0f} ms, "
            f"MFU {step.mfu:.3f}; ratio {ratio:.2f}"
        )
    return ratios


def main() -> None:
    """Count, price and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the step of 65,104 tokens a microbatch alone")
    args = parser.parse_args()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    warnings.simplefilter("ignore")
    steps = {variant.name: step_of(variant, SAMPLES) for variant in (BEFORE, NOW)}
    for name, step in steps.items():
        print(
            f"{name}: {step.tokens} tokens a microbatch, recompute {step.recompute}, peak {step.peak / 1e9:.1f} GB, "
            f"{1e3 * step.seconds:.0f} ms a step, modelled MFU {step.mfu:.3f}"
        )
    print_parts(steps)
    print("the longest kernels of now:")
    print_kernels(steps["now"])
    found: dict[str, float | str] = {}
    if not args.quick:
        small = {variant.name: step_of(variant, gpu.ON_GPU.samples) for variant in (BEFORE, NOW)}
        modes = ", ".join(f"{name}: recompute {step.recompute}" for name, step in small.items())
        print(f"\n{small['now'].tokens} tokens a microbatch; {modes}")
        print_parts(small)
        found |= {f"mfu_{name}_{step.tokens}": round(step.mfu, 4) for name, step in small.items()}
        ratios = compare_with_measured()
        slower = sorted(steps["now"].mfu / ratio for ratio in ratios.values())
        print(f"now at {SAMPLES} samples, if its step is as much longer: MFU {slower[0]:.3f} to {slower[-1]:.3f}")
        found |= ratios
    found |= {f"mfu_{name}": round(step.mfu, 4) for name, step in steps.items()}
    print(json.dumps({**found, "is": "modelled", "machine": "h100"}))


if __name__ == "__main__":
    main()
