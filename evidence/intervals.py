"""Means and their 95% intervals by Student's t, over a few seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Quantile 0.975 of Student's t by degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Interval:
    mean: float
    half: float | None  # half of its width; None for a single value

    @property
    def low(self) -> float:
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half or 0.0)


def interval(values: Sequence[float]) -> Interval:
    """Of the mean of ``values``, of which there is one or more."""
    number = len(values)
    mean = statistics.fmean(values)
    if number < 2:
        return Interval(mean, None)
    t = T_975[min(number - 1, len(T_975)) - 1]
    return Interval(mean, t * statistics.stdev(values) / math.sqrt(number))


def ratio(values: Sequence[float], others: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Positive ``values`` over ``others``, pair by pair: their geometric mean, and the ends of its interval, which
    are None for a single pair."""
    found = interval([math.log(a / b) for a, b in zip(values, others, strict=True)])
    if found.half is None:
        return math.exp(found.mean), None, None
    return math.exp(found.mean), math.exp(found.low), math.exp(found.high)
