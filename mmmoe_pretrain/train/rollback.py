"""Steps that a run rolls back, and the batches that it skips from then on.

A step whose loss or gradient is not finite changes nothing and is skipped. Too many in a row, or a spike of the loss,
roll the run back to the last checkpoint before them, and the batches of those steps are skipped from there on.
Everything is decided from numbers that are equal on all ranks.
"""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.data.loader import StepData
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.exit_codes import Restartable
from mmmoe_pretrain.train.journal import replacing
from mmmoe_pretrain.untrusted import read_json

SKIPPED_BATCHES = "skipped_batches.json"
KEYS_NAMED = 5
TO_DEVIATION = 1.4826  # a normal distribution's standard deviation over its median absolute deviation
WINDOW = 100  # finite losses of the median
MIN_HISTORY = 20  # steps before the first spike can be found
FLOOR = 1e-3  # of the median: the least deviation, so that a flat loss has no spikes


@dataclass(frozen=True)
class BadSteps:
    """Steps (the first of a run is 0) that have to be rolled back."""

    kind: Literal["not finite", "spike"]
    steps: range
    reason: str
    keys: tuple[str, ...] = ()  # of their first samples on this rank

    def describe(self, cursor: Cursor) -> str:
        first, last = self.steps[0], self.steps[-1]
        batches = f"batches {cursor.batch(first)} to {cursor.batch(last)}"
        return f"steps {first + 1} to {last + 1} ({batches}): {self.reason}"


class FaultDetector:
    """Finds bad steps in the results of steps."""

    def __init__(self, config: RunConfig) -> None:
        self._faults, self._train = config.faults, config.train
        self.reset()

    def reset(self) -> None:
        """Clear the history, e.g. after a rollback."""
        faults = self._faults
        self._first = self._count = 0
        self._keys: list[str] = []
        self._spikes = SpikeDetector(faults.spike_threshold, faults.spike_steps) if faults.spike_threshold else None

    @property
    def in_streak(self) -> bool:
        """Whether the last step was skipped, or its loss may be part of a spike that rolls back: a checkpoint of it
        may have to be deleted."""
        spike = self._spikes is not None and self._spikes.suspicious and self._faults.spike_action == "rollback"
        return self._count > 0 or spike

    def add(self, data: StepData, result: StepResult) -> BadSteps | None:
        """Count a step; the bad steps that it completes. fp16 overflows while the loss scale adapts do not count."""
        if not result.skipped:
            self._count = 0
            self._keys.clear()
            return self._spike(data.step, result)
        if self._train.precision == "fp16" and result.loss_scale > self._train.loss_scale.minimum:
            return None
        if self._count == 0:
            self._first = data.step
        self._count += 1
        self._keys += data.keys[: KEYS_NAMED - len(self._keys)]
        if self._count <= self._faults.max_skipped_steps:
            return None
        bad = [name for name, value in result.losses.items() if not math.isfinite(value)] or ["the gradient"]
        reason = f"{', '.join(bad)} not finite in {self._count} step{'s' * (self._count > 1)} in a row"
        return BadSteps("not finite", range(self._first, data.step + 1), reason, tuple(self._keys))

    def _spike(self, step: int, result: StepResult) -> BadSteps | None:
        steps = None if self._spikes is None else self._spikes.add(step, result.losses["total"])
        if steps is None:
            return None
        return BadSteps("spike", steps, f"the loss spiked to {result.losses['total']:.4g}")


class SpikeDetector:
    """Loss spikes: ``steps`` losses in a row that exceed the running median by ``threshold`` deviations (from the
    median absolute deviation). Both are robust: a spike does not raise the bound for the steps after it, and losses
    above the bound are not added to the window until it is clear that they are not a spike. The window is not saved:
    after a resume it fills again, and the first ``MIN_HISTORY`` steps have no spike.
    """

    def __init__(self, threshold: float, steps: int) -> None:
        self._threshold, self._steps = threshold, steps
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._above: list[tuple[int, float]] = []  # the steps in a row that may become a spike

    def add(self, step: int, loss: float) -> range | None:
        """The steps of a spike that ``step`` completes, else None. A loss that is not finite is ignored.

        The losses of a spike then enter the window: a loss that stays high is a new level, and counts as further
        spikes, every ``steps`` steps, only until the window has filled with it.
        """
        if not math.isfinite(loss):
            return None
        if len(self._losses) < MIN_HISTORY or loss <= self._bound():
            self._close_streak()
            self._losses.append(loss)
            return None
        self._above.append((step, loss))
        if len(self._above) < self._steps:
            return None
        spike = range(self._above[0][0], step + 1)
        self._close_streak()
        return spike

    @property
    def suspicious(self) -> bool:
        """Whether the last loss was above the bound, and may be the start of a spike."""
        return bool(self._above)

    def _bound(self) -> float:
        middle = median(self._losses)
        deviation = TO_DEVIATION * median(abs(loss - middle) for loss in self._losses)
        return middle + self._threshold * max(deviation, FLOOR * abs(middle))

    def _close_streak(self) -> None:
        self._losses.extend(loss for _, loss in self._above)
        self._above.clear()


@dataclass
class SkippedBatches:
    """The batches that a run skips and the number of its rollbacks; written before a rollback deletes anything, so
    that a crash loses neither."""

    cursor: Cursor = field(default_factory=Cursor)
    rollbacks: int = 0
    back_to: int | None = None  # a rollback to this step is under way; later checkpoints do not count

    def skip(self, bad_steps: BadSteps, margin: int, resume_step: int) -> tuple[int, int]:
        """Skip the batches of ``bad_steps`` and ``margin`` more on both sides from ``resume_step`` on; the window."""
        first = max(self.cursor.batch(resume_step), self.cursor.batch(bad_steps.steps[0]) - margin)
        end = self.cursor.batch(bad_steps.steps[-1]) + 1 + margin
        self.cursor = self.cursor.skip(first, end, step=resume_step)
        self.rollbacks += 1
        return first, end

    def add(self, saved: Cursor) -> None:
        """Also skip what a checkpoint's cursor skips."""
        self.cursor = Cursor((*self.cursor.skipped, *saved.skipped))

    def write(self, run_dir: Path) -> None:
        """Atomically; on rank 0. Raises Restartable where the disk fails."""
        value: dict[str, Any] = {"skipped_batches": self.cursor.to_json(), "rollbacks": self.rollbacks}
        if self.back_to is not None:
            value["back_to"] = self.back_to
        try:
            with replacing(run_dir / SKIPPED_BATCHES) as draft:
                draft.write_text(json.dumps(value), encoding="utf-8")
        except OSError as error:
            raise Restartable(
                f"cannot write {run_dir / SKIPPED_BATCHES}, which a rollback needs: {error}; make room or repair the "
                f"disk"
            ) from error


def read_skipped_batches(run_dir: Path) -> SkippedBatches:
    """Raises ValueError where the file is not one of these."""
    path = run_dir / SKIPPED_BATCHES
    if not path.is_file():
        return SkippedBatches()
    try:
        value = read_json(path)
        rollbacks, back_to = value["rollbacks"], value.get("back_to")
        for number in (rollbacks, back_to or 0):
            if type(number) is not int or number < 0:
                raise ValueError("rollbacks and back_to must be whole numbers")
        return SkippedBatches(Cursor.from_json(value["skipped_batches"]), rollbacks, back_to)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); repair it, or delete it to skip no batches") from error
