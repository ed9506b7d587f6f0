"""The parity matrix: every layout under every engine against one process.

Bounds. In fp32 layouts differ in the order of sums, about 1e-7 relative each. Adam divides by the root of
the second moment plus eps; the run takes eps = 1e-4 so that a rounding of 1e-8 in a gradient moves a weight by
no more than learning rate * 1e-8 / eps = 3e-7. A lost or doubled gradient shows in the second decimal. Half types
are judged by their first step, before an update, with routing that no rounding can change, and by every parameter's
gradient: this run is chaotic, and a rounding in bf16 becomes 10% of a loss in three steps, of one process against
itself. Seen were 0.1%, 0.2% and 3.5% in bf16 (with tensor ranks, whose partial sums are rounded; 0.5% else), and
0.05%, 0.02% and 0.7% in fp16; a gradient that is lost, doubled or scaled once too often is 50% off or more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from tests.layouts.cases import LEARNING_RATE, STEPS, Case
from tests.layouts.train import Outcome, assemble, reference, start_ranks

LOSS, NORM, WEIGHT, GRADIENT = (
    {"fp32": 2e-5, "bf16": 3e-3, "fp16": 2e-3},
    {"fp32": 1e-4, "bf16": 5e-3, "fp16": 1e-3},
    {"fp32": 1e-5, "bf16": 2 * LEARNING_RATE, "fp16": 2 * LEARNING_RATE},
    {"fp32": 1e-5, "bf16": 0.07, "fp16": 0.015},  # fp32: 2e-6 seen
)
BEGIN, END = "<!-- parity matrix: written by make parity -->", "<!-- end of the parity matrix -->"
SECONDS_A_CASE = 60.0
CASES_A_START = 16  # each start costs every rank a third of a second
T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """Largest differences from one process: of a loss and of the norm relative, of a weight absolute, and of a
    parameter's first gradient relative (``gradient_distance``)."""

    case: Case
    loss: float = math.inf
    norm: float = math.inf
    weight: float = math.inf
    gradient: float = math.inf
    problem: str = ""

    @property
    def passed(self) -> bool:
        bound = self.case.precision
        return (
            not self.problem
            and self.loss <= LOSS[bound]
            and self.norm <= NORM[bound]
            and self.weight <= WEIGHT[bound]
            and self.gradient <= GRADIENT[bound]
        )


def compare(case: Case, ranks: Sequence[Outcome], alone: Outcome) -> Comparison:
    """Compare what every rank reports, and the weights put together."""
    try:
        losses = max(
            abs(rank.losses[step][name] - value) / max(1.0, abs(value))
            for rank in ranks
            for step, values in enumerate(alone.losses)
            for name, value in values.items()
        )
        norms = max(
            abs(mine - theirs) / (theirs or 1.0)
            for rank in ranks
            for mine, theirs in zip(rank.norms, alone.norms, strict=True)
        )
        assert all(rank.tokens == alone.tokens for rank in ranks), "numbers of tokens differ"
        assert all(list(rank.losses[0]) == list(alone.losses[0]) for rank in ranks), "names of losses differ"
        weights = gradients = 0.0
        for name in alone.parameters:
            whole = alone.parameters[name][1][0][1]
            weights = max(
                weights, float(np.abs(assemble([rank.parameters for rank in ranks], name) - whole).max(initial=0.0))
            )
        for name in alone.moments:
            found = assemble([rank.moments for rank in ranks], name)
            gradients = max(gradients, gradient_distance(found, alone.moments[name][1][0][1]))
    except (AssertionError, KeyError) as error:
        return Comparison(case, problem=" ".join(str(error).split())[:200] or repr(error))
    return Comparison(case, losses, norms, weights, gradients)


def gradient_distance(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected| of one parameter, by norm; gradients of next to nothing count as 0."""
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-6))


def run(cases: Sequence[Case], steps: int = STEPS) -> list[Comparison]:
    """``steps``: at least, of the cases in fp32. Some cases of as many ranks share each start of the ranks."""
    found = {}
    for ranks, alike in itertools.groupby(sorted(cases, key=lambda case: case.ranks), key=lambda case: case.ranks):
        for some in chunks(list(alike)):
            runs = [(case, max(steps, len(case.samples)) if case.precision == "fp32" else 1) for case in some]
            outcomes = start_ranks(ranks, runs, SECONDS_A_CASE * (1 + len(runs)))
            for i, (case, count) in enumerate(runs):
                found[case] = compare(case, [rank[i] for rank in outcomes], reference(case.alone, count))
    return [found[case] for case in cases]


def chunks(cases: Sequence[T]) -> list[Sequence[T]]:
    """Those of one start of the ranks each."""
    return [cases[first : first + CASES_A_START] for first in range(0, len(cases), CASES_A_START)]


def table(comparisons: Sequence[Comparison]) -> str:
    """Markdown."""
    lines = [
        "| layout | ranks | engine | ZeRO | type | loss | gradient norm | gradients | weights | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for v in comparisons:
        c = v.case
        state = "equal" if v.passed else f"**differs** {v.problem}"
        lines.append(
            f"| {c.layout} | {c.ranks} | {c.engine} | {c.zero_stage} | {c.precision} | {v.loss:.0e} | {v.norm:.0e} | "
            f"{v.gradient:.0e} | {v.weight:.0e} | {state} |"
        )
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Replace the text between the marks."""
    before, found, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{path} has no place for the table; it needs the lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
