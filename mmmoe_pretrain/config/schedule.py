"""Settings that may change over training: a number, or numbers at steps with straight lines between."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator

from mmmoe_pretrain.untrusted import brief

Schedule = tuple[tuple[int, float], ...]  # (step, weight), rising in steps; straight lines between


def _of_pairs(value: Any) -> Any:
    if isinstance(value, list) and not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
        raise ValueError(
            f"weight {brief(value)} is no number or [[step, weight], ...]; e.g. [[0, 0.0], [1000, 0.25]]"
        )
    return value


Weight = Annotated[float | Schedule, BeforeValidator(_of_pairs)]


def check_schedule(schedule: Schedule, name: str) -> None:
    """Raises ValueError unless its steps rise from 0 on and no weight is negative."""
    steps = [step for step, _ in schedule]
    rising = all(before < after for before, after in pairwise(steps))
    if not steps or steps[0] < 0 or not rising or any(weight < 0 for _, weight in schedule):
        raise ValueError(
            f"{name} {schedule[0][1] if steps == [0] else schedule} must be a number from 0 on, or "
            f"[[step, {name}], ...] with rising steps; e.g. [[0, 0.0], [1000, 0.25]]"
        )


def schedule_of(weight: Weight) -> Schedule:
    """A number alone is its value at every step."""
    return weight if isinstance(weight, tuple) else ((0, float(weight)),)


def value_at(schedule: Schedule, step: float) -> float:
    """The value at a step (the first is 0)."""
    for (first, low), (last, high) in pairwise(schedule):
        if first <= step < last:
            return low + (high - low) * (step - first) / (last - first)
    return schedule[0][1] if step < schedule[0][0] else schedule[-1][1]
