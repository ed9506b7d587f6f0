"""What a job of many ranks does beside computing: seconds and bytes of its control plane from 8 to 1,024 ranks.

All ranks are threads of this process, and the collectives in which they meet are simulated (control/ranks.py): a
stand-in hands what they send to rank 0 and counts it. Nothing crosses a network, and no figure has its time.
Everything else is the code that a job runs, at the layout of configs/mmmoe_30b_a3b.yaml (experts over 8 ranks, the
rest data-parallel), whose state is described and not held:

- plan: the layout, its process groups (torch's ``fake`` ones), and the model on the device meta.
- start: the ranks agree that they have the same config.
- data index: rank 0 lists a source of 10^5 shards and opens its index; a rank gets the list and opens the index.
- data order: of 10^9 samples a rank's share of a microbatch of 4 a rank, levelled by tokens; the first after a seek.
- save plan: who writes which box. ZeRO-1: as megatron-core cuts its buckets, ZeRO-3: every parameter over all data
  ranks.
- index of a save: rank 0 writes index.json, boxes.bin and the manifest.
- load plan: of that, what a rank of another layout (experts over 4 ranks, ZeRO-1) reads.
- heartbeats: what rank 0 does for them, a second.

Legend. rank 0, others: seconds, of others the slowest (CPU time of a thread; of written files wall time). in, out: MB
that rank 0 receives and sends. files: MB written, or read by a rank. growth: the exponent of R in seconds | bytes,
from the second number of ranks on.

Prints a table and, as its last line, one JSON object by part: ``seconds_1024`` of the slowest rank, ``bytes_1024`` of
rank 0 and files, ``exponent`` and ``bytes_exponent``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.control import parts
from benchmarks.control.parts import Figures
from benchmarks.control.state import ranges_of_buckets, ranges_of_parameters
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "mmmoe_30b_a3b.yaml"
RANKS, SHARDS, SAMPLES = (8, 64, 256, 1024), 10**5, 20  # samples of a shard in the index, of which opening reads none
LEAST = 0.01, 1e4  # seconds and bytes below which a growth means nothing

Found = Mapping[str, Mapping[int, Figures]]  # by part and ranks


def measure(config: RunConfig, ranks: int, shards: int, folder: Path) -> Iterator[tuple[str, Figures]]:
    """All parts at one number of ranks."""
    yield "plan", parts.plan_part(config, ranks)
    yield "start", parts.start_part(config, ranks)
    of_data = parts.data_config(config, ranks, shards)
    yield "data index", parts.index_part(of_data, ranks)
    yield from parts.order_parts(of_data, ranks, shards)
    for name, ranges in (("ZeRO-1", ranges_of_buckets), ("ZeRO-3", ranges_of_parameters)):
        with tempfile.TemporaryDirectory(dir=folder) as root:
            for part, figures in parts.checkpoint_parts(config, ranks, ranges, Path(root)):
                yield f"{part}, {name}", figures
    yield "heartbeats", parts.heartbeat_part(ranks)


def exponent(values: Mapping[int, float], least: float) -> float:
    """Of R, by least squares of logarithms; numbers below ``least`` count as that."""
    points = [(math.log(ranks), math.log(max(value, least))) for ranks, value in values.items()]
    points = points[1:] if len(points) > 2 else points  # at few ranks constants are most of it
    x, y = (sum(its) / len(points) for its in zip(*points, strict=True))
    spread = sum((a - x) ** 2 for a, _ in points)
    return sum((a - x) * (b - y) for a, b in points) / spread if spread else 0.0


def growth(of_part: Mapping[int, Figures]) -> tuple[float, float]:
    """Of seconds and of bytes."""
    return (
        exponent({ranks: its.seconds for ranks, its in of_part.items()}, LEAST[0]),
        exponent({ranks: its.nbytes for ranks, its in of_part.items()}, LEAST[1]),
    )


def summary(found: Found) -> dict[str, dict[str, float]]:
    """Of the largest number of ranks."""
    last: dict[str, dict[str, float]] = {}
    for part, of_part in found.items():
        ranks = max(of_part)
        seconds, nbytes = growth(of_part)
        last[part] = {
            f"seconds_{ranks}": round(of_part[ranks].seconds, 3), f"bytes_{ranks}": round(of_part[ranks].nbytes),
            "exponent": round(seconds, 2), "bytes_exponent": round(nbytes, 2),
        }  # fmt: skip
    return last


def print_table(found: Found) -> None:
    print(
        f"{'part':<26}{'ranks':>6}{'rank 0 s':>10}{'others s':>10}{'in MB':>9}{'out MB':>9}{'files MB':>10}  growth"
    )
    for part, of_part in found.items():
        for ranks, its in of_part.items():
            grown = "{:.2f} | {:.2f}".format(*growth(of_part)) if ranks == max(of_part) else ""
            print(
                f"{part:<26}{ranks:>6}{its.first:>10.3f}{its.others:>10.3f}{its.received / 1e6:>9.2f}"
                f"{its.sent / 1e6:>9.2f}{its.files / 1e6:>10.2f}  {grown}"
            )


def run(numbers: Sequence[int], shards: int = SHARDS) -> Found:
    """All parts at all numbers of ranks."""
    config = run_config.load(CONFIG, ("train.num_microbatches=1",))
    found: dict[str, dict[int, Figures]] = defaultdict(dict)
    with tempfile.TemporaryDirectory() as name:
        os.environ["MMMOE_CACHE"] = name
        parts.write_index(parts.data_config(config, 8, shards), SAMPLES)
        for ranks in numbers:
            for part, figures in measure(config, ranks, shards, Path(name)):
                found[part][ranks] = figures
    return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="multiples of 8")
    parser.add_argument("--quick", action="store_true", help="8 and 64 ranks")
    args = parser.parse_args()
    found = run(RANKS[:2] if args.quick else sorted(args.ranks))
    print_table(found)
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
