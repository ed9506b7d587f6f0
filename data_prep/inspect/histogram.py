"""Counts of values by powers of two: bounded, whatever the values are."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

_BARS = "▁▂▃▄▅▆▇█"
_EXPONENTS = -4, 48  # of the lowest and the highest bin; what lies beyond is counted in them


class Histogram:
    """Of values that are 0 or more. The bin of exponent e holds 2^e <= value < 2^(e+1), and None the zeros."""

    def __init__(self) -> None:
        self.count, self.total, self.least, self.most = 0, 0.0, math.inf, 0.0
        self._bins: Counter[int | None] = Counter()

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.least, self.most = min(self.least, value), max(self.most, value)
        exponent = min(max(math.frexp(value)[1] - 1, _EXPONENTS[0]), _EXPONENTS[1]) if value > 0 else None
        self._bins[exponent] += 1

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    def bins(self) -> list[tuple[float, float, int]]:
        """From, below, and how many values; with the empty bins between the others."""
        found = [(0.0, 0.0, self._bins[None])] if self._bins[None] else []
        held = [exponent for exponent in self._bins if exponent is not None]
        for exponent in range(min(held, default=0), max(held, default=-1) + 1):
            found.append((2.0**exponent, 2.0 ** (exponent + 1), self._bins[exponent]))
        return found

    def bars(self) -> str:
        """A bar a bin, between the ends: ``16 ▁█▃ 128``."""
        bins = self.bins()
        most = max(count for _, _, count in bins)
        bars = (_BARS[math.ceil(count / most * len(_BARS)) - 1] if count else " " for _, _, count in bins)
        return f"{bins[0][0]:,g} {''.join(bars)} {bins[-1][1]:,g}"

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "least": self.least, "mean": self.mean, "most": self.most, "bins": self.bins()}
