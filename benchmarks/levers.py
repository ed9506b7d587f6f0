"""Gain and cost of the settings for memory and speed, each compared with the same run without it.

Recomputation, torch.compile, bf16 and fp16, and the cached contrastive loss in one process; tokens sent in
chunks, overlapped reductions and gathers, and optimizer state on the host over two ranks. Whole optimizer steps
(data ready) of a deeper demo with two experts a token. All variants of a table step in turn in one run; a time
ratio is the median over the repeats of ratios of neighbouring steps. Memory is the largest sum of live tensors
of a step beyond those that were there before it (on a CPU counted as operations make and drop them, on a GPU by
the allocator), so that it holds activations, gradients in flight and temporaries, not parameters, main gradients
or moments; but for the levers of two ranks on GPUs, where it is all that the engine holds. (Of a CPU's buffers
above ``moe.memory.MALLOC_RECYCLES``, which experts keep for reuse, it knows nothing; the sizes here stay below.)
Time on a CPU is that of one thread; of ranks, the wall clock of the slower.

``cached``: N microbatches whose contrastive loss is of them all, beside one batch of all their samples (the
same loss) and beside plain accumulation (negatives of one microbatch alone). That variants compute the same
is checked by their first losses.

What a CPU cannot show, and is printed beside the numbers: half types are not faster where the processor has no
arithmetic for them; overlap needs something that transfers while the ranks compute, and gloo takes the cores that
compute; memory of the device and of the host are one, so that moving state between them saves nothing.

Prints tables and, as its last line, one JSON object of ratios: below 1 is less memory or time.
``*_cached_S`` are against one batch of S samples, ``time_cached_S_vs_accumulated`` against the same microbatches
with small negatives, all others against the same step without the lever.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.common.forked import on_ranks
from benchmarks.common.start_deepspeed import prepare_deepspeed
from benchmarks.levering.measure import Row, Variant, batches, check_same, measure, show
from benchmarks.levering.ranks import FAMILIES, RANKS, measure_family
from benchmarks.stepping.workload import VOCAB_SIZE
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import Engine
from mmmoe_pretrain.engines.megatron import prepare
from mmmoe_pretrain.parallel.degrees import resolve_degrees
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.mesh import build_groups
from mmmoe_pretrain.parallel.runtime import process_group

ROOT = Path(__file__).resolve().parents[1]
MODEL = ["model.num_layers=8", f"model.vocab_size={VOCAB_SIZE}", "moe.experts_per_token=2"]
COMPILE = "compile"
LEVERS = {
    "none": [],
    "recompute_experts": ["train.recompute=experts"],
    "recompute_blocks": ["train.recompute=blocks"],
    "bf16": ["train.precision=bf16"],
    "fp16": ["train.precision=fp16"],
    COMPILE: ["train.compile=blocks"],
}
MICROBATCHES = 4
CACHED = ["objectives.pairs.cached=true", f"train.num_microbatches={MICROBATCHES}"]
TIMEOUT = 600.0  # seconds for one layout of two ranks
ON_A_CPU = (
    "bf16, fp16: their time is of this processor's arithmetic in them, which may be emulated",
    "overlap_*, dispatch_chunks: gloo's transfers take the cores that compute, so that there is little to hide",
    "offload_cpu: the device's memory is the host's; the time is that of the copies, and nothing is saved",
)


def ratios(rows: dict[str, Row], yardstick: str = "none") -> dict[str, float]:
    """Of each lever's time and peak; compiled functions do not run under a counter of operations."""
    found, base = {}, rows[yardstick]
    for name, row in rows.items():
        if name != yardstick:
            found[f"time_{name}"] = row.time_against(base)
            if name != COMPILE:
                found[f"memory_{name}"] = row.peak / base.peak
    return found


def alone(path: Path, levers: list[str], samples: int, repeats: int, groups: Groups,
          device: torch.device) -> dict[str, float]:  # fmt: skip
    """The levers of one process."""
    variants = {}
    for name in levers:
        config = run_config.load(path, [*MODEL, *LEVERS[name]])
        variants[name] = Variant(build_engine(config, groups, device), batches(config, samples, 1))
    rows = measure(variants, repeats, device)
    check_same(rows, "none")
    show(f"{samples} samples", rows, "none")
    return ratios(rows)


def over_ranks(path: Path, samples: int, repeats: int) -> dict[str, float]:
    """The settings of two ranks; those whose engine or device is missing are skipped, with a message."""
    gpus = torch.cuda.device_count()
    if 0 < gpus < RANKS:
        print(f"skipped: the levers of {RANKS} ranks, since there is one GPU; CUDA_VISIBLE_DEVICES= takes the CPU")
        return {}
    found: dict[str, float] = {}
    with_deepspeed = prepare_deepspeed()
    prepare()
    for family in FAMILIES:
        if family.deepspeed and not with_deepspeed:
            continue
        rows = on_ranks(RANKS, measure_family, family, path, MODEL, samples, repeats, timeout=TIMEOUT)
        check_same(rows, "none")
        show(f"{family.title}, {samples} samples", rows, "none")
        found |= ratios(rows)
    return found


def cached(path: Path, samples: int, repeats: int, groups: Groups, device: torch.device) -> dict[str, float]:
    """Ratios against one batch of all samples."""
    config = run_config.load(path, MODEL)
    parts = batches(config, samples, MICROBATCHES)

    def engine(*overrides: str) -> Engine:
        return build_engine(run_config.load(path, [*MODEL, *overrides]), groups, device)

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
        f"time_cached_{samples}": ours.time_against(one),
        f"time_cached_{samples}_vs_accumulated": ours.time_against(plain),
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
        levers, samples, repeats = [name for name in levers if name != COMPILE], 16, 2
    found = over_ranks(args.config, samples, repeats)  # first: what has used a GPU cannot be forked
    config = run_config.load(args.config, MODEL)
    with process_group(timeout_minutes=5) as device:
        groups = build_groups(resolve_degrees(config.parallel, config.moe.group_sizes, dist.get_world_size()))
        found |= alone(args.config, levers, samples, repeats, groups, device)
        for size in (samples, 2 * samples):
            found |= cached(args.config, size, repeats, groups, device)
    if device.type == "cpu":
        print("\n".join(ON_A_CPU))
    print(json.dumps({**{name: round(value, 3) for name, value in found.items()}, "device": device.type}))


if __name__ == "__main__":
    main()
