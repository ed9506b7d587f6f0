"""What the levers of memory and speed buy and cost: recomputation, torch.compile, the cached contrastive loss.

Whole optimizer steps of one process (data ready), a deeper demo with two experts a token. All variants step
in turn in one run; medians. Memory is the largest sum of live tensors of a step beyond those that were there
before it (on a CPU counted as operations make and drop them, on a GPU by the allocator), so that it holds
activations, gradients in flight and temporaries, not parameters, main gradients or moments. (Of a CPU's
buffers above ``moe.memory.MALLOC_RECYCLES``, which experts keep for reuse, it knows nothing; the sizes here
stay below.) Time on a CPU is that of one thread.

``cached``: N microbatches whose contrastive loss is of them all, beside one batch of all their samples (the
same loss) and beside plain accumulation (negatives of one microbatch alone). That variants compute the same
is checked by their first losses.

Prints tables and, as its last line, one JSON object of ratios: below 1 is less memory or time.
``*_recompute_*`` and ``time_compile`` are against the same step without the lever, ``*_cached_S`` against one
batch of S samples, ``time_cached_S_vs_accumulated`` against the same microbatches with small negatives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.stepping.workload import BOS, EOS, VOCAB_SIZE, random_samples
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Engine
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.mesh import build_groups
from mmmoe_pretrain.parallel.runtime import process_group

ROOT = Path(__file__).resolve().parents[1]
MODEL = ["model.num_layers=8", "moe.experts_per_token=2"]
LEVERS = {
    "none": [],
    "recompute_experts": ["train.recompute=experts"],
    "recompute_blocks": ["train.recompute=blocks"],
    "compile": ["train.compile=blocks"],
}
MICROBATCHES = 4
CACHED = ["objectives.contrastive.cached=true", f"train.num_microbatches={MICROBATCHES}"]
# Of first losses. Recomputation comes after them; compiled and cached steps sum in another order in fp32.
SAME = {"recompute_experts": 0.0, "recompute_blocks": 0.0, "compile": 1e-4, "cached": 1e-4}


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that operations have made since and that are still held; ``peak`` of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in before | self._known:
                self._see(x.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


@dataclass(frozen=True)
class Variant:
    engine: Engine
    microbatches: list[Batch]

    def step(self) -> dict[str, float]:
        return self.engine.step(self.microbatches, 1e-4).losses


@dataclass(frozen=True)
class Row:
    seconds: float
    peak: int  # bytes
    losses: dict[str, float]  # of the first step


def batches(config: RunConfig, samples: int, parts: int) -> list[Batch]:
    """The same samples in ``parts`` microbatches; each sample keeps its position, and so its tasks."""
    made, settings = random_samples(config, samples, seed=samples), PackSettings(
        config.modalities, BOS, EOS, config.objectives.captioning, config.seed
    )  # fmt: skip
    size = samples // parts
    return [pack(made[i : i + size], settings, range(i, i + size)) for i in range(0, samples, size)]


def clock_for(device: torch.device) -> Callable[[], float]:
    def cuda_clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return cuda_clock if device.type == "cuda" else time.process_time


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        with LiveTensors() as tensors:
            work()
        return tensors.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def measure(variants: dict[str, Variant], repeats: int, device: torch.device) -> dict[str, Row]:
    """The first step warms up, the last one is for memory: after a counter of operations torch runs no
    compiled function any more."""
    clock = clock_for(device)
    losses = {name: variant.step() for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            began = clock()
            variant.step()
            seconds[name].append(clock() - began)
    peaks = {name: peak_of(variant.step, device) for name, variant in variants.items()}
    return {name: Row(statistics.median(seconds[name]), peaks[name], losses[name]) for name in variants}


def check_same(rows: dict[str, Row], yardstick: str) -> None:
    """Raise RuntimeError where a variant's contrastive losses are not those of the yardstick."""
    for name, row in rows.items():
        for loss, expected in rows[yardstick].losses.items():
            bound = SAME.get(name)
            if bound is None or not loss.startswith("contrastive"):
                continue
            if abs(row.losses[loss] - expected) > bound * abs(expected):
                raise RuntimeError(f"{name} computes {loss} {row.losses[loss]!r}, {yardstick} {expected!r}")


def show(title: str, rows: dict[str, Row], yardstick: str) -> None:
    print(f"{title:<32}{'ms a step':>12}{'ratio':>8}{'peak MB':>10}{'ratio':>8}")
    for name, row in rows.items():
        base = rows[yardstick]
        print(f"{name:<32}{1e3 * row.seconds:>12.1f}{row.seconds / base.seconds:>8.2f}"
              f"{row.peak / 1e6:>10.1f}{row.peak / base.peak:>8.2f}")  # fmt: skip


def recompute_and_compile(path: Path, levers: list[str], samples: int, repeats: int, groups: Groups,
                          device: torch.device) -> dict[str, float]:  # fmt: skip
    """Ratios against the step without a lever."""
    variants = {}
    for name in levers:
        config = run_config.load(path, [*MODEL, *LEVERS[name]])
        variants[name] = Variant(build_engine(config, VOCAB_SIZE, groups, device), batches(config, samples, 1))
    rows = measure(variants, repeats, device)
    check_same(rows, "none")
    show(f"{samples} samples", rows, "none")
    found = {}
    for name in levers[1:]:
        found[f"time_{name}"] = rows[name].seconds / rows["none"].seconds
        if name != "compile":  # it does not run under a counter of operations
            found[f"memory_{name}"] = rows[name].peak / rows["none"].peak
    return found


def cached(path: Path, samples: int, repeats: int, groups: Groups, device: torch.device) -> dict[str, float]:
    """Ratios against one batch of all samples."""
    config = run_config.load(path, MODEL)
    parts = batches(config, samples, MICROBATCHES)

    def engine(*overrides: str) -> Engine:
        return build_engine(run_config.load(path, [*MODEL, *overrides]), VOCAB_SIZE, groups, device)

    rows = measure(
        {
            "one batch": Variant(engine(), batches(config, samples, 1)),
            "accumulated": Variant(engine(CACHED[1]), parts),
            "cached": Variant(engine(*CACHED), parts),
        },
        repeats,
        device,
    )
    check_same(rows, "one batch")
    show(f"{samples} samples, {MICROBATCHES} microbatches", rows, "one batch")
    one, plain, ours = rows.values()
    return {
        f"memory_cached_{samples}": ours.peak / one.peak,
        f"time_cached_{samples}": ours.seconds / one.seconds,
        f"time_cached_{samples}_vs_accumulated": ours.seconds / plain.seconds,
    }


def main() -> None:
    """Measure each lever in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats, nothing compiled")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    args = parser.parse_args()
    torch.set_num_threads(1)
    levers, samples, repeats = list(LEVERS), 64, 7
    if args.quick:
        levers, samples, repeats = levers[:-1], 16, 2
    config = run_config.load(args.config, MODEL)
    with process_group(timeout_minutes=5) as device:
        groups = build_groups(config.parallel, config.moe.group_sizes)
        found = recompute_and_compile(args.config, levers, samples, repeats, groups, device)
        for size in (samples, 2 * samples):
            found |= cached(args.config, size, repeats, groups, device)
    print(json.dumps({**{name: round(value, 3) for name, value in found.items()}, "device": device.type}))


if __name__ == "__main__":
    main()
