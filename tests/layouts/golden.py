"""The losses of a hundred steps, on record, and every layout against them.

Bound: over the hundred steps layouts were seen to stay within 1e-6 of one process in the loss (which falls from
10.8 to 5.8); ten times that leaves room for the sums of other processors. A wrong scale shows in the second decimal.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tests.distributed import run_ranks
from tests.layouts.cases import LAYOUTS, Case
from tests.layouts.train import Outcome, start_ranks, train_alone

STEPS = 100
BOUND = 1e-5
RECORD = Path(__file__).resolve().parents[1] / "assets" / "golden_losses.json"
SECONDS_A_CASE = 400.0


def golden_cases() -> list[Case]:
    """Every layout: ZeRO-1 under megatron, and ZeRO-2 under DeepSpeed where there is no pipeline."""
    cases = []
    for layout, (ranks, degrees) in LAYOUTS.items():
        cases.append(Case(layout, ranks, "megatron", 1, degrees))
        if "pipeline_parallel_size" not in degrees:
            cases.append(Case(layout, ranks, "deepspeed", 2, degrees))
    return cases


def recorded() -> list[dict[str, float]]:
    """By step and name."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def largest_difference(ranks: Sequence[Outcome]) -> float:
    """Of any loss at any step on any rank from the record."""
    golden = recorded()
    assert all(len(rank.losses) == len(golden) for rank in ranks)
    return max(
        abs(mine[name] - value)
        for rank in ranks
        for mine, step in zip(rank.losses, golden, strict=True)
        for name, value in step.items()
    )


def run(case: Case, root: Path) -> float:
    """Train the case; its largest difference."""
    outcomes = start_ranks(case.ranks, [case], root, STEPS, SECONDS_A_CASE)
    return largest_difference([rank[0] for rank in outcomes])


def record(root: Path) -> None:
    """Write the losses of one process under plain torch."""
    losses = run_ranks(1, train_alone, root, STEPS, timeout=SECONDS_A_CASE)[0].losses
    rows = [json.dumps({name: round(value, 8) for name, value in step.items()}) for step in losses]
    RECORD.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")
