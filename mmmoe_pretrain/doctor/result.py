"""What a check finds, and how it is printed. A judge of a check is a pure function from the reports to a Verdict."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "not run", "warning", "FAILED"]
LEVELS: tuple[Level, ...] = ("ok", "not run", "warning", "FAILED")  # from good to bad
Reports = Mapping[str, Any]  # host (or rank) -> what it measured
MOST = 8  # hosts that a message names
LONGEST = 2000  # characters of a message, whatever the hosts report


@dataclass(frozen=True)
class Problem:
    level: Level
    seen: str
    remedy: str


@dataclass(frozen=True)
class Verdict:
    """``seen``: what is shown where there is no problem."""

    seen: str
    problems: Sequence[Problem] = ()


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    check: str
    result: Level
    seen: str
    remedy: str = ""

    @classmethod
    def of(cls, check: str, verdict: Verdict) -> Result:
        if not verdict.problems:
            return cls(check, "ok", verdict.seen[:LONGEST])
        level = max((problem.level for problem in verdict.problems), key=LEVELS.index)
        seen = "; ".join(problem.seen for problem in verdict.problems)
        remedies = dict.fromkeys(problem.remedy for problem in verdict.problems if problem.remedy)
        return cls(check, level, seen[:LONGEST], "; ".join(remedies))


def names(hosts: Iterable[str]) -> str:
    """E.g. "a, b and 3 more"."""
    found = list(hosts)
    more = f" and {len(found) - MOST} more" if len(found) > MOST else ""
    return ", ".join(found[:MOST]) + more


def odd_ones(values: Mapping[str, object]) -> tuple[dict[str, object], object]:
    """The hosts whose value is not that of most, and that of most. Where no value has more than half of the hosts,
    all are odd, and most have None."""
    counted = Counter(values.values()).most_common(1)
    if not counted:
        return {}, None
    usual, count = counted[0]
    if 2 * count <= len(values) and count < len(values):
        return dict(values), None
    return {host: value for host, value in values.items() if value != usual}, usual


def mismatch(what: str, values: Mapping[str, object]) -> str:
    """Which hosts differ from the others, e.g. "torch: b has 2.12 (the others 2.13)"; empty where all are equal."""
    odd, usual = odd_ones(values)
    if not odd:
        return ""
    told = names(f"{host} has {value}" for host, value in odd.items())
    return f"{what}: {told}" + (f" (the others {usual})" if usual is not None else "")


def size(count: float) -> str:
    """Bytes, e.g. "1.5 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def table(results: Sequence[Result]) -> str:
    width = max((len(result.check) for result in results), default=0)
    lines = []
    for result in results:
        lines.append(f"{result.check:<{width}}  {result.result:<7}  {result.seen}")
        if result.remedy:
            lines.append(f"{'':<{width}}           remedy: {result.remedy}")
    return "\n".join(lines)


def as_json(results: Sequence[Result], **more: object) -> str:
    return json.dumps({**more, "checks": [asdict(result) for result in results]})
