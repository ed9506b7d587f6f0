"""The parity matrix: every layout under every engine against one process.

Bounds. In fp32 layouts differ in the order of sums, about 1e-7 relative each. Adam divides by the root of
the second moment plus eps; the run takes eps = 1e-4 so that a rounding of 1e-8 in a gradient moves a weight by
no more than learning rate * 1e-8 / eps = 3e-7. A lost or doubled gradient shows in the second decimal. bf16
has 8 bits, and a token near the edge between two experts may take the other one: its runs are held to those of one
process in bf16 within 3% of a loss and 10% of a norm; weights can say no more than that no step went astray. fp16 has
11 bits, and its layouts agree to 0.1% and 0.2% until one token takes the other expert, which was seen to cost 1.3%
and 5.5% (TP2): 2% and 8%. That nothing is scaled wrongly is the matter of tests/engines/test_fp16.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.distributed import run_ranks
from tests.layouts.cases import LEARNING_RATE, STEPS, Case, in_fp16
from tests.layouts.train import Outcome, assemble, start_ranks, train_alone

LOSS, NORM, WEIGHT = (
    {"fp32": 2e-5, "bf16": 0.03, "fp16": 0.02},
    {"fp32": 1e-4, "bf16": 0.1, "fp16": 0.08},
    {"fp32": 1e-5, "bf16": 2 * STEPS * LEARNING_RATE, "fp16": 2 * STEPS * LEARNING_RATE},
)
BEGIN, END = "<!-- parity matrix: written by make parity -->", "<!-- end of the parity matrix -->"
SECONDS_A_CASE = 60.0
CASES_A_START = 4  # a start costs a second; threads of the groups that were before add up within one
ONE_IN_HALF = {
    "bf16": Case("one process", 1, "megatron", 0, {}, "bf16"),
    "fp16": in_fp16("one process", 0, "megatron"),
}


@dataclass(frozen=True)
class Verdict:
    """Largest differences from one process: of a loss and of the norm relative, of a weight absolute."""

    case: Case
    loss: float = math.inf
    norm: float = math.inf
    weight: float = math.inf
    problem: str = ""

    @property
    def passed(self) -> bool:
        bound = self.case.precision
        return (
            not self.problem
            and self.loss <= LOSS[bound]
            and self.norm <= NORM[bound]
            and self.weight <= WEIGHT[bound]
        )


def judge(case: Case, ranks: Sequence[Outcome], alone: Outcome) -> Verdict:
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
        weights = 0.0
        for name in alone.parameters:
            whole = alone.parameters[name][1][0][1]
            weights = max(
                weights, float(np.abs(assemble([rank.parameters for rank in ranks], name) - whole).max(initial=0.0))
            )
    except (AssertionError, KeyError) as error:
        return Verdict(case, problem=" ".join(str(error).split())[:200] or repr(error))
    return Verdict(case, losses, norms, weights)


def run(cases: Sequence[Case], root: Path) -> list[Verdict]:
    """Some cases of as many ranks share each start of the ranks."""
    alone = {"fp32": run_ranks(1, train_alone, root, STEPS)[0]}
    for precision, case in ONE_IN_HALF.items():
        alone[precision] = start_ranks(1, [case], root, STEPS, SECONDS_A_CASE)[0][0]
    verdicts = []
    for ranks, some in itertools.groupby(sorted(cases, key=lambda c: c.ranks), key=lambda c: c.ranks):
        todo = list(some)
        while todo:
            group, todo = todo[:CASES_A_START], todo[CASES_A_START:]
            outcomes = start_ranks(ranks, group, root, STEPS, SECONDS_A_CASE * (1 + len(group)))
            for i, case in enumerate(group):
                verdicts.append(judge(case, [rank[i] for rank in outcomes], alone[case.precision]))
    order = {case: i for i, case in enumerate(cases)}
    return sorted(verdicts, key=lambda verdict: order[verdict.case])


def table(verdicts: Sequence[Verdict]) -> str:
    """Markdown."""
    lines = [
        "| layout | ranks | engine | ZeRO | type | loss | gradient norm | weights | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for v in verdicts:
        c = v.case
        state = "equal" if v.passed else f"**differs** {v.problem}"
        lines.append(
            f"| {c.layout} | {c.ranks} | {c.engine} | {c.zero_stage} | {c.precision} | {v.loss:.0e} | {v.norm:.0e} | "
            f"{v.weight:.0e} | {state} |"
        )
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Replace what stands between the marks."""
    before, found, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise ValueError(f"{path} has no place for the table; it needs the lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
