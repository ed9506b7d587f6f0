"""Steps that cannot be trusted, and the batches that a run leaves out after going back.

A step whose loss or gradient is not finite changes nothing and is forgiven; too many in a row, or a spike of
the loss, send the run back to the checkpoint before them, and the batches of those steps are left out from
then on. Everything is decided from numbers that all ranks have alike.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.data.loader import StepData
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.exit_codes import Restartable
from mmmoe_pretrain.train.drafts import replacing
from mmmoe_pretrain.train.spikes import SpikeDetector
from mmmoe_pretrain.untrusted import read_json

SKIPS = "skipped_batches.json"
KEYS_NAMED = 5


@dataclass(frozen=True)
class Trouble:
    """Steps (the first of a run is 0) that the run must not build on."""

    kind: Literal["not finite", "spike"]
    steps: range
    why: str
    keys: tuple[str, ...] = ()  # of their first samples on this rank


class BadSteps:
    """Watches the results of steps; ``add`` says when it is enough."""

    def __init__(self, config: RunConfig) -> None:
        self._faults, self._scale = config.faults, config.train
        self.forget()

    def forget(self) -> None:
        """Begin anew, e.g. after going back."""
        faults = self._faults
        self._first = self._count = 0
        self._keys: list[str] = []
        self._spikes = SpikeDetector(faults.spike_threshold, faults.spike_steps) if faults.spike_threshold else None

    @property
    def in_streak(self) -> bool:
        """Was the last step left out, or its loss one of a spike to go back from? What is saved now may have to be
        undone."""
        spike = self._spikes is not None and self._spikes.suspicious and self._faults.spike_action == "rollback"
        return self._count > 0 or spike

    def add(self, data: StepData, result: StepResult) -> Trouble | None:
        """Count a step. Overflows while fp16's loss scale finds its level are no faults."""
        if not result.skipped:
            self._count = 0
            self._keys.clear()
            return self._spike(data.step, result)
        if self._scale.precision == "fp16" and result.loss_scale > self._scale.loss_scale.minimum:
            return None
        if self._count == 0:
            self._first = data.step
        self._count += 1
        self._keys += data.keys[: KEYS_NAMED - len(self._keys)]
        if self._count <= self._faults.max_skipped_steps:
            return None
        bad = [name for name, value in result.losses.items() if not math.isfinite(value)] or ["the gradient"]
        why = f"{', '.join(bad)} not finite in {self._count} step{'s' * (self._count > 1)} in a row"
        return Trouble("not finite", range(self._first, data.step + 1), why, tuple(self._keys))

    def _spike(self, step: int, result: StepResult) -> Trouble | None:
        steps = None if self._spikes is None else self._spikes.add(step, result.losses["total"])
        if steps is None:
            return None
        return Trouble("spike", steps, f"the loss spiked to {result.losses['total']:.4g}")


@dataclass
class Skips:
    """How often a run went back, and what it leaves out; on disk before it goes back, so that no crash forgets it."""

    cursor: Cursor = field(default_factory=Cursor)
    rollbacks: int = 0
    back_to: int | None = None  # the run is going back to this step; what later checkpoints know is undone

    def leave_out(self, trouble: Trouble, margin: int, resume_step: int) -> tuple[int, int]:
        """Skip the batches of ``trouble`` and ``margin`` more on both sides from ``resume_step`` on; the window."""
        first = max(self.cursor.batch(resume_step), self.cursor.batch(trouble.steps[0]) - margin)
        end = self.cursor.batch(trouble.steps[-1]) + 1 + margin
        self.cursor = self.cursor.skip(first, end, step=resume_step)
        self.rollbacks += 1
        return first, end

    def add(self, saved: Cursor) -> None:
        """Leave out what a checkpoint says, too."""
        self.cursor = Cursor((*self.cursor.skipped, *saved.skipped))

    def write(self, run_dir: Path) -> None:
        """Atomically; rank 0 alone. Raises Restartable where the disk fails."""
        value: dict[str, Any] = {"skipped_batches": self.cursor.to_json(), "rollbacks": self.rollbacks}
        if self.back_to is not None:
            value["back_to"] = self.back_to
        try:
            with replacing(run_dir / SKIPS) as draft:
                draft.write_text(json.dumps(value), encoding="utf-8")
        except OSError as error:
            raise Restartable(
                f"cannot write {run_dir / SKIPS}, without which a run must not go back: {error}; make room or mend "
                f"the disk"
            ) from error


def read_skips(run_dir: Path) -> Skips:
    """Raises ValueError where the file is not one of these."""
    path = run_dir / SKIPS
    if not path.is_file():
        return Skips()
    try:
        value = read_json(path)
        rollbacks, back_to = value["rollbacks"], value.get("back_to")
        for number in (rollbacks, back_to or 0):
            if type(number) is not int or number < 0:
                raise ValueError("rollbacks and back_to must be whole numbers")
        return Skips(Cursor.from_json(value["skipped_batches"]), rollbacks, back_to)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); mend it, or delete it to leave nothing out") from error
