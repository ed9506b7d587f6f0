"""How communication grows with the ranks: calls and bytes of a step, counted and compared with the closed form.

Families of layouts over 1, 2, 4 and 8 forked gloo ranks, at fixed tokens a rank: a job with twice the ranks has twice
the samples. Every call of torch.distributed in one optimizer step of two microbatches is counted
(mmmoe_pretrain/parallel/counting.py), those of megatron-core too, and held against what the plan says
(mmmoe_pretrain/plan/communication.py), by kind and group on every rank. Nothing is timed.

Legend. calls, KB: means over the ranks of what leaves one rank, as counted. plan: planned bytes over counted
ones, with the routing of the step known; must be 1. even: the same if every pair of experts were as likely,
which is what can be planned before a run. rows: that leave for other ranks, over the most that any routing
makes leave; at most 1. (The last two are for all-to-all alone.)

Prints a table and, as its last line, one JSON object: ``worst_relative_error`` of any kind, group and
rank (0 but for fp64 rounding), ``calls_differ``, ``worst_even_error`` (all-to-all bytes of a rank if
routing were even), ``worst_rows``, and ``bytes``, those of a rank by family and number of ranks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, its folder alone is there

from benchmarks.common.forked import on_ranks
from benchmarks.growth.layouts import FAMILIES, SAMPLES, Family, layout_config
from benchmarks.growth.measured import Comparison, Totals, compare
from mmmoe_pretrain.engines.megatron import prepare
from mmmoe_pretrain.parallel.agreement import gather_objects
from mmmoe_pretrain.parallel.counting import ALL_TO_ALL, Total
from mmmoe_pretrain.parallel.mesh import build_host_groups, destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group

RANKS, TIMEOUT = (1, 2, 4, 8), 300.0  # seconds for all layouts of a number of ranks


@dataclass(frozen=True)
class Row:
    """One layout over all its ranks. ``kinds``: mean calls and bytes of a rank; ``planned``, ``expected``:
    mean bytes. ``error``: the worst of any kind, group and rank."""

    kinds: dict[str, Total]
    planned: dict[str, float]
    expected: dict[str, float]
    error: float
    calls_differ: bool
    even_error: float
    rows: float

    @property
    def sent(self) -> float:
        return sum(total.sent for total in self.kinds.values())


def measure(families: Sequence[Family]) -> dict[str, Row]:
    """On every rank; all ranks know the same rows."""
    torch.set_num_threads(1)
    found = {}
    with process_group(timeout_minutes=2):
        for family in families:
            own = compare(layout_config(family, dist.get_world_size()), SAMPLES * family.sharing)
            found[family.name] = make_row(gather_objects(build_host_groups(timeout_minutes=2).control, own))
            destroy_groups()
    return found


def make_row(ranks: Sequence[Comparison]) -> Row:
    measured = [by_kind(item.measured) for item in ranks]
    kinds = sorted({kind for totals in measured for kind in totals})
    mean = {
        kind: Total(
            round(sum(totals[kind].calls for totals in measured) / len(ranks)),
            sum(totals[kind].sent for totals in measured) / len(ranks),
        )
        for kind in kinds
    }
    return Row(
        mean,
        {kind: sum(by_kind(item.planned)[kind].sent for item in ranks) / len(ranks) for kind in kinds},
        {kind: sum(by_kind(item.expected)[kind].sent for item in ranks) / len(ranks) for kind in kinds},
        error=max(relative_error(item.measured, item.planned) for item in ranks),
        calls_differ=any(calls(item.measured) != calls(item.planned) for item in ranks),
        even_error=max(relative_error(all_to_all(item.measured), all_to_all(item.expected)) for item in ranks),
        rows=max(item.rows / item.most_rows if item.most_rows else 0.0 for item in ranks),
    )


def by_kind(totals: Totals) -> dict[str, Total]:
    found: dict[str, Total] = defaultdict(Total)
    for (kind, _), total in totals.items():
        found[kind] += total
    return found


def relative_error(measured: Totals, planned: Totals) -> float:
    """The worst of any kind and group; 1 where one of the two has none."""
    nothing = Total()
    errors = [
        abs(planned.get(key, nothing).sent - measured.get(key, nothing).sent)
        / max(planned.get(key, nothing).sent, measured.get(key, nothing).sent, 1.0)
        for key in measured.keys() | planned.keys()
    ]
    return max(errors, default=0.0)


def calls(totals: Totals) -> dict[object, int]:
    return {key: total.calls for key, total in totals.items()}


def all_to_all(totals: Totals) -> Totals:
    return {key: total for key, total in totals.items() if key[0] == ALL_TO_ALL}


def print_row(ranks: int, name: str, row: Row) -> None:
    for kind, total in row.kinds.items():
        plan = f"{row.planned[kind] / total.sent:.6f}" if total.sent else "-"
        routing = f"{row.expected[kind] / total.sent:>8.3f}{row.rows:>8.3f}" if kind == ALL_TO_ALL else ""
        print(
            f"{ranks:>5} {name:<24}{kind:<16}{total.calls:>6}{total.sent / 1e3:>11.2f}{plan:>10}{routing}", flush=True
        )
    if not row.kinds:
        print(f"{ranks:>5} {name:<24}nothing")


def summary(rows: dict[tuple[str, int], Row]) -> dict[str, object]:
    """The last line."""
    sent: dict[str, dict[int, int]] = defaultdict(dict)
    for (name, ranks), row in rows.items():
        sent[name][ranks] = round(row.sent)
    return {
        "worst_relative_error": max(row.error for row in rows.values()),
        "calls_differ": [f"{name} on {ranks}" for (name, ranks), row in rows.items() if row.calls_differ],
        "worst_even_error": round(max(row.even_error for row in rows.values()), 3),
        "worst_rows": round(max(row.rows for row in rows.values()), 3),
        "layouts": len(rows),
        "bytes": sent,
    }


def main() -> None:
    """Count over 1, 2, 4 and 8 ranks, and print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 4 ranks")
    args = parser.parse_args()
    prepare()
    print(f"{'ranks':>5} {'layout':<24}{'kind':<16}{'calls':>6}{'KB':>11}{'plan':>10}{'even':>8}{'rows':>8}")
    rows: dict[tuple[str, int], Row] = {}
    for ranks in RANKS[: 3 if args.quick else None]:
        families = [family for family in FAMILIES if ranks >= family.fewest]
        for name, row in on_ranks(ranks, measure, families, timeout=TIMEOUT).items():
            rows[name, ranks] = row
            print_row(ranks, name, row)
    print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
