"""Loss spikes: far above the running median, measured by the median absolute deviation, and for several steps.

Both shrug off outliers, so that a spike does not raise the bar for the steps after it. Steps of a spike under way
stay out of the window for the same reason.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median

TO_DEVIATION = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
MIN_HISTORY = 20  # steps before the first verdict
FLOOR = 1e-3  # of the median: the least deviation, lest a flat loss make a spike of nothing


class SpikeDetector:
    """Call ``add`` after every step; equal losses give equal answers, thus every rank decides alike.

    ``threshold``: deviations above the median; ``steps``: in a row; ``window``: of how many finite losses the
    median is. The window is not saved: after a resume it fills anew, MIN_HISTORY steps without a verdict.
    """

    def __init__(self, threshold: float, steps: int, window: int = 100) -> None:
        if threshold <= 0 or steps < 1 or window < MIN_HISTORY:
            raise ValueError(
                f"a spike needs a threshold above 0, 1 step or more and a window of {MIN_HISTORY} or more, "
                f"not {threshold}, {steps} and {window}; see faults.spike_threshold and spike_steps"
            )
        self.threshold, self.steps = threshold, steps
        self._losses: deque[float] = deque(maxlen=window)
        self._above: list[tuple[int, float]] = []  # the steps in a row that may become a spike

    def add(self, step: int, loss: float) -> range | None:
        """The steps of a spike that ``step`` completes, else None. A loss that is not finite is ignored.

        After a spike the detector starts anew from the losses before it; if the loss stays up, which is then no
        spike but a new level, these answer again every ``steps`` steps until the window has filled with it.
        """
        if not math.isfinite(loss):
            return None
        if len(self._losses) < MIN_HISTORY or loss <= self.bound():
            self._settle()
            self._losses.append(loss)
            return None
        self._above.append((step, loss))
        if len(self._above) < self.steps:
            return None
        spike = range(self._above[0][0], step + 1)
        self._settle()
        return spike

    @property
    def suspicious(self) -> bool:
        """Was the last loss above the bound? A spike may be under way."""
        return bool(self._above)

    def bound(self) -> float:
        """Losses above it are suspicious."""
        middle = median(self._losses)
        deviation = TO_DEVIATION * median(abs(loss - middle) for loss in self._losses)
        return middle + self.threshold * max(deviation, FLOOR * abs(middle))

    def _settle(self) -> None:
        """Single high losses are noise like any other, and a level that stays must become the normal one."""
        self._losses.extend(loss for _, loss in self._above)
        self._above.clear()
