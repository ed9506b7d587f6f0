"""Forward and backward of the MoE layer, compared with other libraries and the dense layer of equal FLOPs.

One process, the same weights, tokens and routing for all: T tokens, E experts, K = 2 experts a token,
hidden size D = 512, of an expert F = 1,024. Balanced routing makes every expert as likely as another,
skewed routing gives the busiest 8 times the mean (three quarters of all tokens where that is less).
Our library of products is measured as a run measures it (``moe/cpu/calibration.py``), and printed.
Implementations take turns, medians over repeats; before they are timed, their outputs and token
gradients are compared with ours (benchmarks/layer).
Prints a table (legend below it) and, as its last line, one JSON object.

    python benchmarks/moe_layer.py --quick           some points in about four minutes on two cores
    python benchmarks/moe_layer.py                   the whole grid
    python benchmarks/moe_layer.py --points E128-bf16 --peers transformers
    python benchmarks/moe_layer.py --even            equal loads instead of balanced: what suits padding
    python benchmarks/moe_layer.py --curve           our cost against T, K and E
    python benchmarks/moe_layer.py --device cuda     one large point in bf16 on a GPU
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.layer import roofline
from benchmarks.layer.peers import OURS, PEERS, TWIN, YARDSTICK, Dense, DenseTwin, Layer, Ours, calibrated, missing
from benchmarks.layer.roofline import Bound, Machine
from benchmarks.layer.timing import TOLERANCE, Timing, clock_for, time_layers
from benchmarks.layer.workload import BALANCED, EVEN, SKEWED, Point, make_task

FP32, BF16 = torch.float32, torch.bfloat16
GRID = [
    Point(tokens, experts, dtype, threads, routing)
    for tokens, dtype, threads, experts, routing in itertools.product(
        (8192, 1024), (FP32, BF16), (1, 2), (8, 32, 128), (BALANCED, SKEWED)
    )
]
QUICK = [
    Point(8192, 8),
    Point(8192, 32),
    Point(8192, 128),
    Point(8192, 32, threads=2),
    Point(8192, 32, BF16),
    Point(8192, 32, BF16, routing=SKEWED),
    Point(8192, 128, BF16),
    Point(1024, 32),
    Point(1024, 32, routing=SKEWED),
]


@dataclass(frozen=True)
class Row:
    """A point as measured."""

    point: Point
    timings: dict[str, Timing]
    bound: Bound

    def against(self, name: str) -> float | None:
        """Its time over ours; None where it was not timed or computes something else."""
        timing = self.timings.get(name)
        if timing is None or (name not in (YARDSTICK, TWIN) and not timing.agrees(self.point.dtype)):
            return None
        return timing.seconds / self.timings[OURS].seconds

    def share_of_dense(self, name: str) -> float:
        return self.timings[YARDSTICK].seconds / self.timings[name].seconds


def geometric_mean(rows: list[Row], name: str) -> float | None:
    """Of its time over ours; None where it was timed at no point."""
    ratios = [ratio for row in rows if (ratio := row.against(name)) is not None]
    return round(statistics.geometric_mean(ratios), 3) if ratios else None


def skew_against_balanced(rows: list[Row]) -> float | None:
    """The worst of our time under skew over our time without, over the pairs of points measured."""
    ours = {row.point: row.timings[OURS].seconds for row in rows}
    ratios = [
        seconds / ours[other]
        for point, seconds in ours.items()
        for other in (replace(point, routing=BALANCED), replace(point, routing=EVEN))
        if point.routing == SKEWED and other in ours
    ]
    return round(max(ratios), 3) if ratios else None


def summary(rows: list[Row], machine: Machine) -> dict[str, object]:
    """The last line. Ratios above 1 are in our favour, but for ``skew_vs_balanced``."""
    peers = [(ratio, row.point.name, name) for row in rows for name in PEERS if (ratio := row.against(name))]
    worst = min(peers, default=None)
    balanced = [row for row in rows if row.point.routing != SKEWED]
    return {
        "vs_dense": geometric_mean(rows, YARDSTICK),
        "vs_dense_twin": geometric_mean(rows, TWIN),
        **{f"vs_{name}": geometric_mean(rows, name) for name in PEERS},
        "worst_vs_peer": worst and round(worst[0], 3),
        "worst_point": worst and f"{worst[1]} {worst[2]}",
        "skew_vs_balanced": skew_against_balanced(rows),
        "balanced": {f"vs_{name}": geometric_mean(balanced, name) for name in (YARDSTICK, *PEERS)},
        "disagree": sorted({
            f"{row.point.name} {name}"
            for row in rows for name in PEERS if name in row.timings and row.against(name) is None
        }),
        "points": len(rows),
        "threads": sorted({row.point.threads for row in rows}),
        "device": machine.device.type,
        "torch": torch.__version__,
        "clock": "cpu time at one thread" if machine.busy else "wall",
    }  # fmt: skip


def measure(point: Point, peers: list[str], machine: Machine, repeats: int) -> Row:
    """Build every implementation of the point, time them, and let them go."""
    torch.set_num_threads(point.threads)
    task = make_task(point, machine.device)
    cpu = calibrated(point)
    layers: dict[str, Layer] = {YARDSTICK: Dense(task), TWIN: DenseTwin(task, cpu.products), OURS: Ours(task, cpu)}
    layers.update({name: PEERS[name][0](task) for name in peers})
    clock = clock_for(machine.device, machine.busy)
    row = Row(point, time_layers(layers, task, repeats, clock), machine.bound(point, task.counts_E))
    del layers, task
    gc.collect()  # modules hold themselves in cycles, and the next point needs the memory
    return row


def header(peers: list[str]) -> str:
    shares = "".join(f"{name:>13}" for name in (OURS, "of twin", *peers))
    parts = "".join(f"{name:>8}" for name in ("roof", "arith", "small", "weights", "perm"))
    return f"{'point':<30}{'dense ms':>9}{'ours ms':>9}{shares}{parts}  bound by"


def line(row: Row, peers: list[str]) -> str:
    """Shares of dense; then the bounds as shares of our time. ``!`` marks another function's output."""
    ours, bound, twin = row.timings[OURS].seconds, row.bound, row.against(TWIN)
    cells = [f"{row.share_of_dense(OURS):>12.2f} ", f"{'-' if twin is None else f'{twin:.2f}':>12} "]
    for name in peers:
        mark = " " if row.against(name) is not None else "!"
        cells.append(f"{row.share_of_dense(name):>12.2f}{mark}")
    terms = (bound.roofline, bound.arithmetic, bound.small_products, bound.weights, bound.permutation)
    parts = "".join(f"{term / ours:>8.2f}" for term in terms)
    return (
        f"{row.point.name:<30}{1e3 * row.timings[YARDSTICK].seconds:>9.0f}{1e3 * ours:>9.0f}"
        f"{''.join(cells)}{parts}  {bound.reason}"
    )


def legend(machine: Machine) -> str:
    rates = []
    for key, rate in sorted(machine.rates.items(), key=str):
        if key[0] == "matmul":
            rates.append(f"{key[1]} {key[-1]} thread(s) {rate / 1e9:.0f} GFLOP/s")
        elif key[0] == "bandwidth":
            rates.append(f"copy {key[-1]} thread(s) {rate / 1e9:.1f} GB/s")
    assert roofline.__doc__ is not None
    return (
        "\nours and the peers: share of the dense layer's speed (torch.nn.Linear), above 1 is faster than dense. of "
        "twin: ours against the dense layer by the library of products that ours takes. All outputs and "
        f"token gradients agree with ours to a relative {TOLERANCE[FP32]:g} (fp32), {TOLERANCE[BF16]:g} (bf16), "
        "but for those marked !, which no mean counts.\nroof and the columns after it: bounds as shares of our "
        f"time.\n{roofline.__doc__}\nMeasured: " + "; ".join(rates)
    )


def slope(sizes: list[int], seconds: list[float]) -> float:
    """The exponent of a power law through the points, by least squares of the logarithms."""
    logs = torch.tensor([sizes, seconds], dtype=torch.float64).log()
    centred = logs - logs.mean(1, keepdim=True)
    return round(((centred[0] * centred[1]).sum() / centred[0].square().sum()).item(), 3)


def curve(machine: Machine, quick: bool, repeats: int) -> dict[str, object]:
    """Our time against T, K and E, the others fixed: exponents of 1, 1 and 0 are linear and flat."""
    small = 2 if quick else 1
    swept = {
        "T": [Point(tokens, 32) for tokens in (1024, 2048, 4096, 8192, 16384)[: -1 if quick else None]],
        "K": [Point(4096 // small, 32, top_k=k) for k in (1, 2, 4, 8)],
        "E": [Point(8192 // small, experts) for experts in (8, 16, 32, 64, 128, 256, 512)],
    }
    found: dict[str, object] = {}
    print(f"{'swept':<7}{'T':>7}{'K':>4}{'E':>5}{'ms':>9}{'us/token/expert':>17}{'roof':>7}{'weights':>9}")
    for name, points in swept.items():
        seconds = []
        for point in points:
            torch.set_num_threads(point.threads)
            task = make_task(point, machine.device)
            clock = clock_for(machine.device, machine.busy)
            taken = time_layers({OURS: Ours(task, calibrated(point))}, task, repeats, clock)[OURS].seconds
            bound = machine.bound(point, task.counts_E)
            seconds.append(taken)
            print(f"{name:<7}{point.tokens:>7}{point.top_k:>4}{point.experts:>5}{1e3 * taken:>9.0f}"
                  f"{1e6 * taken / point.assignments:>17.1f}{bound.roofline / taken:>7.2f}"
                  f"{bound.weights / taken:>9.2f}", flush=True)  # fmt: skip
        sizes = {"T": [p.tokens for p in points], "K": [p.top_k for p in points], "E": [p.experts for p in points]}
        found[f"exponent_{name}"] = slope(sizes[name], seconds)
        print(f"exponent of {name}: {found[f'exponent_{name}']}", flush=True)
    return {**found, "threads": [1], "device": machine.device.type, "torch": torch.__version__}


def chosen_points(args: argparse.Namespace) -> list[Point]:
    """ValueError where ``--points`` names none."""
    known = QUICK if args.quick else GRID
    if args.even:
        known = [replace(point, routing=EVEN) if point.routing == BALANCED else point for point in known]
    points = [point for point in known if any(text in point.name for text in args.points or [""])]
    if not points:
        names = ", ".join(point.name for point in known)
        raise ValueError(f"--points {' '.join(args.points)} names no point; take part of a name of: {names}")
    return points


def grid(args: argparse.Namespace, machine: Machine, points: list[Point]) -> dict[str, object]:
    """The table of the chosen points."""
    reasons = {name: missing(name) for name in PEERS if not args.peers or name in args.peers}
    for reason in filter(None, reasons.values()):
        print(reason)
    peers = [name for name, reason in reasons.items() if reason is None]
    print(header(peers), flush=True)
    rows = []
    for point in points:
        rows.append(measure(point, peers, machine, args.repeats))
        print(line(rows[-1], peers), flush=True)
    print(legend(machine))
    return summary(rows, machine)


def main() -> None:
    """Measure, and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some points, few repeats")
    parser.add_argument("--points", nargs="+", help="only points whose name contains one of these")
    parser.add_argument("--even", action="store_true", help="equal loads instead of balanced ones")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), help="only these peers")
    parser.add_argument("--repeats", type=int, help="3 with --quick, else 7")
    parser.add_argument("--busy", action="store_true", help="one thread by CPU time: for a machine that others use")
    parser.add_argument("--curve", action="store_true", help="our cost against T, K and E instead")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the GPU's point instead")
    args = parser.parse_args()
    args.repeats = args.repeats or (3 if args.quick else 7)
    try:
        points = chosen_points(args)
    except ValueError as error:
        parser.error(str(error))
    machine = Machine(torch.device(args.device), args.busy)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            parser.error("--device cuda needs a GPU that torch can see; leave it out to measure on the CPU")
        if args.curve or args.points or args.peers or args.even:
            parser.error("--device cuda measures its one point; remove --curve, --points, --peers and --even")
        from benchmarks.layer.gpu import gpu_point

        found = gpu_point(machine, args.repeats)
    elif args.curve:
        found = curve(machine, args.quick, args.repeats)
    else:
        found = grid(args, machine, points)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
