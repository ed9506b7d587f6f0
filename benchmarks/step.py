"""Tokens a second of whole training steps over two ranks, beside the expert layers of others.

One model (embedders, attention, objectives, data, initial weights, optimizer: all the same) at four
sizes; the expert layer and the engine are swapped:
  ours       this repository's expert layer under its engine on megatron-core
  megatron   megatron-core's MoELayer (SequentialMLP, all-to-all) under the same engine: Megatron's
             schedule, DistributedDataParallel and optimizer
  deepspeed  DeepSpeed's MoE (no drops) under DeepSpeed's engine, without ZeRO
Two gloo ranks with one thread each, experts spread over both, K = 2, fp32. All contenders take a step of the
same batch in turn, in one run; a ratio is the median over the repeats of (their seconds / ours), of the
slower rank. Before they are timed, all must have the same weights outside of the experts and the same
losses over some steps. Our library of products is measured as in a run, and printed. The parts are where our step
spends its time, in percent of the wall clock and, in the line below, in milliseconds of the median step.

Prints a table and, as its last line, one JSON object: ``vs_deepspeed`` and ``vs_megatron`` (geometric
means over the sizes, above 1 in our favour), ``worst``, ``shares`` (means over the sizes) and ``milliseconds`` (by
size).

    python benchmarks/step.py            about six minutes on two cores
    python benchmarks/step.py --quick    fewer samples and repeats
    python benchmarks/step.py --busy     by CPU time: for a machine that others use
    python benchmarks/step.py --dense    one rank: the MoE model beside the dense model of equal active FLOPs
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.common.forked import on_ranks, slowest_rank
from benchmarks.common.start_deepspeed import prepare_deepspeed, start_deepspeed
from benchmarks.stepping.clock import PARTS, time_parts
from benchmarks.stepping.peers import (
    DEEPSPEED,
    MEGATRON,
    DeepSpeedEngine,
    DeepSpeedLayer,
    MegatronLayer,
    PeerLayer,
    replace_moe_layers,
)
from benchmarks.stepping.workload import SIZES, VOCAB_SIZE, Size, random_batch, step_config, valid_tokens
from evidence.studies import dense
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.apply import build_engine
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.engines.megatron import MegatronEngine, prepare
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.parallel.degrees import Layout, resolve_degrees
from mmmoe_pretrain.parallel.groups import Groups, HostGroups
from mmmoe_pretrain.parallel.mesh import build_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.train.cpu import settle

OURS = "ours"
ROOT = Path(__file__).resolve().parents[1]
RANKS, TIMEOUT = 2, 600.0  # seconds for one size
LEARNING_RATE = 1e-4
# Losses of the first steps, relative. The first: sums in another order, through some layers. After it, Adam
# divides each gradient by its own size, so roundings of gradients near 0 become steps of the learning rate.
CLOSE = (1e-5, 1e-3, 1e-3)


Clock = Callable[[], float]


class Stepper(Protocol):
    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult: ...


@dataclass(frozen=True)
class Row:
    """One size as measured: tokens of a step over all ranks, seconds of the repeats, shares of our time."""

    tokens: int
    seconds: dict[str, list[float]]
    shares: dict[str, float]

    def against(self, name: str) -> float:
        """Their seconds over ours."""
        pairs = zip(self.seconds[name], self.seconds[OURS], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    @property
    def milliseconds(self) -> dict[str, float]:
        """Of our median step, by part."""
        whole = 1e3 * statistics.median(self.seconds[OURS])
        return {part: share * whole for part, share in self.shares.items()}

    def rate(self, name: str) -> float:
        """Tokens a second."""
        return self.tokens / statistics.median(self.seconds[name])


def build(name: str, config: RunConfig, groups: Groups, device: torch.device) -> tuple[PretrainingModel, Stepper]:
    """The model with the expert layer of ``name``, and what steps it."""
    model = PretrainingModel(config, groups)
    layers: dict[str, type[PeerLayer]] = {DEEPSPEED: DeepSpeedLayer, MEGATRON: MegatronLayer}
    if name in layers:
        replace_moe_layers(model, layers[name])
    if name == DEEPSPEED:
        return model, DeepSpeedEngine(model, config)
    return model, MegatronEngine([model], config, device)


def calibrated(config: RunConfig, layout: Layout, device: torch.device) -> RunConfig:
    """The config with ``train.cpu`` as a new run would choose it; rank 0 prints it. Collective."""
    settled = settle(config, layout, HostGroups(storage=dist.group.WORLD), device, found=())
    if dist.get_rank() == 0:
        print(f"train.cpu.products: {settled.train.cpu.products}", flush=True)
    return settled


def batches_of(config: RunConfig, size: Size, number: int) -> list[Batch]:
    """This rank's, one a step."""
    return [random_batch(config, size.samples, 1000 * dist.get_rank() + i) for i in range(number)]


def check_same(size: Size, names: Sequence[str], groups: Groups, device: torch.device) -> dict[str, list[float]]:
    """Loss of each of the first steps by name. Without balance losses, which every library defines differently,
    and without clipping. Raises AssertionError where weights or losses differ."""
    config = step_config(size, balance=0.0, clip_norm=0.0)
    built = {name: build(name, config, groups, device) for name in names}
    ours = dict(built[OURS][0].named_parameters())
    for name, (model, _) in built.items():
        for key, parameter in model.named_parameters():
            assert ".ffn.layer." in key or torch.equal(parameter, ours[key]), f"{name}: {key} starts elsewhere"
    batches = batches_of(config, size, len(CLOSE))
    losses = {name: [step(engine, batch) for batch in batches] for name, (_, engine) in built.items()}
    for name, found in losses.items():
        for i, (a, b, close) in enumerate(zip(found, losses[OURS], CLOSE, strict=True)):
            assert abs(a - b) <= close * abs(b), f"{name}: the loss of step {i} is {a}, ours {b}"
    return losses


def step(engine: Stepper, batch: Batch) -> float:
    """One step; the loss without auxiliary terms, which other libraries do not report."""
    losses = engine.step([batch], LEARNING_RATE).losses
    return sum(value for name, value in losses.items() if name != "total" and not name.startswith("aux/"))


def measure(size: Size, names: Sequence[str], repeats: int, clock: Clock) -> Row:
    """On every rank; all ranks know the same row."""
    torch.set_num_threads(1)
    with process_group(timeout_minutes=5) as device:
        if DEEPSPEED in names:
            start_deepspeed()
        config = step_config(size)
        layout = resolve_degrees(config.parallel, config.moe.num_experts, dist.get_world_size())
        config, groups = calibrated(config, layout, device), build_groups(layout)
        check_same(size, names, groups, device)
        gc.collect()
        engines = {name: build(name, config, groups, device)[1] for name in names}
        batches = batches_of(config, size, repeats + 1)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for i, batch in enumerate(batches):  # the first warms up
            for name in [*names[i % len(names) :], *names[: i % len(names)]]:
                seconds[name].append(seconds_of_step(engines[name], batch, clock))
        shares = shares_of_parts(engines[OURS], batches[1:])
        tokens = torch.tensor([valid_tokens(batch) for batch in batches[1:]], dtype=torch.float64).mean()
        dist.all_reduce(tokens)
    return Row(round(float(tokens)), {name: values[1:] for name, values in seconds.items()}, shares)


def seconds_of_step(engine: Stepper, batch: Batch, clock: Clock = time.perf_counter) -> float:
    """Of the slowest rank."""
    dist.barrier()
    began = clock()
    engine.step([batch], LEARNING_RATE)
    return slowest_rank(clock() - began)


def shares_of_parts(engine: Stepper, batches: Sequence[Batch]) -> dict[str, float]:
    """Means over the ranks."""
    assert isinstance(engine, MegatronEngine)
    clock = time_parts(engine)
    for batch in batches:
        engine.step([batch], LEARNING_RATE)
    shares = clock.shares()
    values = torch.tensor([shares[part] for part in PARTS], dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(PARTS, (values / dist.get_world_size()).tolist(), strict=True))


def summary(rows: Mapping[str, Row]) -> dict[str, object]:
    """The last line."""
    peers = [name for name in next(iter(rows.values())).seconds if name != OURS]
    ratios = {(name, size): row.against(name) for size, row in rows.items() for name in peers}
    worst = min(ratios, key=lambda key: ratios[key]) if ratios else None
    return {
        **{f"vs_{name}": geometric_mean([row.against(name) for row in rows.values()]) for name in peers},
        "worst": worst and round(ratios[worst], 3),
        "worst_point": worst and f"{worst[1]} {worst[0]}",
        "shares": {part: round(statistics.mean(row.shares[part] for row in rows.values()), 4) for part in PARTS},
        "milliseconds": {name: {p: round(ms, 1) for p, ms in row.milliseconds.items()} for name, row in rows.items()},
        "sizes": len(rows),
        "device": "cpu",
        "torch": torch.__version__,
    }


def geometric_mean(ratios: Sequence[float]) -> float:
    return round(statistics.geometric_mean(ratios), 3)


def line(size: Size, row: Row) -> str:
    peers = "".join(f"{row.rate(name):>11,.0f}{row.against(name):>7.2f}" for name in row.seconds if name != OURS)
    start = f"{size.name:<22}{row.tokens:>7}{row.rate(OURS):>11,.0f}{peers}"
    percent = "".join(f"{100 * row.shares[part]:>8.0f}" for part in PARTS)
    return f"{start}{percent}\n{'ms':>{len(start)}}{''.join(f'{row.milliseconds[part]:>8.1f}' for part in PARTS)}"


def header(names: Sequence[str]) -> str:
    peers = "".join(f"{name:>11}{'ratio':>7}" for name in names if name != OURS)
    where = "".join(f"{part[:7]:>8}" for part in PARTS)
    return f"{'size':<22}{'tokens':>7}{'ours':>11}{peers}{where}  (tokens a second; % of our step)"


def beside_peers(quick: bool, busy: bool) -> dict[str, object]:
    """The table over the sizes."""
    clock = time.process_time if busy else time.perf_counter
    prepare()
    names = [OURS, MEGATRON, *([DEEPSPEED] if prepare_deepspeed() else [])]
    print(header(names), flush=True)
    rows = {}
    for size in SIZES:
        size = replace(size, samples=size.samples // 2) if quick else size
        rows[size.name] = on_ranks(RANKS, measure, size, names, 2 if quick else 7, clock, timeout=TIMEOUT)
        print(line(size, rows[size.name]), flush=True)
    return {**summary(rows), "clock": "cpu time" if busy else "wall"}


def beside_dense(path: Path, quick: bool) -> dict[str, object]:
    """One rank, at several microbatch sizes: compute (forward, backward, optimizer), not data loading."""
    sizes, repeats = ([16], 3) if quick else ([16, 64, 128], 9)
    torch.set_num_threads(1)
    moe = run_config.load(path).with_vocabulary(VOCAB_SIZE)
    width = moe.moe.experts_per_token * moe.moe.expert_hidden_size  # of equal active FLOPs
    configs = {"moe": moe, "dense": run_config.load(path, dense(width)).with_vocabulary(VOCAB_SIZE)}
    print(f"{'samples':>8}{'tokens':>8}{'MoE tok/s':>16}{'dense tok/s':>14}{'ratio':>8}")
    ratios = []
    with process_group(timeout_minutes=5) as device:
        layout = resolve_degrees(moe.parallel, moe.moe.num_experts, dist.get_world_size())
        configs["moe"], groups = calibrated(moe, layout, device), build_groups(layout)
        engines = {name: build_engine(config, groups, device) for name, config in configs.items()}
        for size in sizes:
            batch = random_batch(moe, size, seed=size)
            times: dict[str, list[float]] = {name: [] for name in engines}
            for _ in range(repeats + 1):  # the first warms up
                for name, engine in engines.items():
                    times[name].append(seconds_of_step(engine, batch))
            median = {name: statistics.median(values[1:]) for name, values in times.items()}
            tokens = valid_tokens(batch)
            ratios.append(median["dense"] / median["moe"])
            print(f"{size:>8}{tokens:>8}{tokens / median['moe']:>16,.0f}{tokens / median['dense']:>14,.0f}"
                  f"{ratios[-1]:>8.2f}")  # fmt: skip
    return {"vs_dense": geometric_mean(ratios), "device": device.type}


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples and repeats")
    parser.add_argument("--busy", action="store_true", help="ratios of CPU time: for a machine that others use")
    parser.add_argument("--dense", action="store_true", help="beside the dense model instead")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml", help="of --dense")
    args = parser.parse_args()
    found = beside_dense(args.config, args.quick) if args.dense else beside_peers(args.quick, args.busy)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
