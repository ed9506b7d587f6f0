"""When a run saves itself, and what it says of that in journal and log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NoReturn

from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.checkpoint.retention import Retention
from mmmoe_pretrain.checkpoint.saver import Saver, SaveReport
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.train.session import Session
from mmmoe_pretrain.train.tally import Tally

log = logging.getLogger(__name__)


class Saving:
    """The saves of a run. All ranks call the same methods in the same order."""

    def __init__(self, session: Session, say: Callable[[str], None]) -> None:
        settings = session.config.checkpoint
        self._session, self._settings, self._say = session, settings, say
        keep = Retention(settings.keep_last, settings.keep_every, settings.keep_best)
        self._saver = Saver(session.config.checkpoint_root, session.host.storage, keep, settings.asynchronous)
        losses = ("total", *session.engine.models[0].loss_names)  # type: ignore[misc]  # of a PretrainingModel
        if settings.keep_best and settings.best_metric not in losses:
            raise ValueError(
                f"checkpoint.best_metric {settings.best_metric!r} is none of this run's losses: {', '.join(losses)}"
            )
        self._begun = -1  # the step of the last save
        self._last: SaveReport | None = None
        self.failures = 0  # one after the other, of the saves that are known to have ended

    def save(self, step: int, cursor: Cursor, samples: Tally, losses: dict[str, float]) -> None:
        """Begin to save ``step``; training may go on when this returns."""
        meta = self._session.meta(cursor, samples, losses)
        self._saver.save(step, self._session.engine.export_state(), meta, self._metric(losses))
        self._begun = step

    def save_now(self, step: int, cursor: Cursor, samples: Tally, losses: dict[str, float]) -> None:
        """See that ``step`` is saved when this returns. Raises ValueError on every rank where it cannot be,
        Restartable where a disk or a peer failed; the checkpoints before are there."""
        self.wait()
        if self._begun != step or (self._last is not None and self._last.error is not None):
            self.save(step, cursor, samples, losses)
            self.wait()
        if self._last is not None and self._last.error is not None:
            kind = exit_codes.Restartable if self._last.restartable else ValueError
            raise kind(f"step {step} could not be saved: {self._last.error}")

    def wait(self) -> None:
        """Until no save is in flight."""
        self._saver.wait()
        self.collect()

    def collect(self) -> None:
        """Journal the saves that have ended. Ranks may learn of an end in different steps."""
        for report in self._saver.poll():
            self._last = report
            self.failures = 0 if report.error is None else self.failures + 1
            self._tell(report)

    def too_many(self, failures: int) -> bool:
        """Have too many saves failed for the run to go on? ``failures``: as rank 0 counts them."""
        return failures > self._settings.max_failures

    def give_up(self, failures: int) -> NoReturn:
        """End the run with the reason of the last failure."""
        self.wait()
        reason = self._last.error if self._last is not None else None
        raise ValueError(
            f"{failures} saves failed one after the other, and checkpoint.max_failures is "
            f"{self._settings.max_failures}; the last one: {reason}"
        )

    def forget(self) -> None:
        """After going back: the step saved last may come again with other numbers."""
        self._begun = -1

    def close(self) -> None:
        self._saver.close()
        self.collect()

    def _metric(self, losses: dict[str, float]) -> float | None:
        return losses.get(self._settings.best_metric)  # none before the first step

    def _tell(self, report: SaveReport) -> None:
        if not self._session.main:
            return
        journal = self._session.journal
        if report.error is not None:
            log.error("step %d could not be saved: %s", report.step, report.error)
            journal.write("save_failed", step=report.step, error=report.error)
            return
        self._say(f"saved {report.path}")
        journal.write(
            "saved", step=report.step, path=report.path, bytes=report.bytes,
            seconds_blocked=round(report.seconds_blocked, 4), seconds_waited=round(report.seconds_waited, 4),
            seconds_writing=round(report.seconds_writing, 4),
        )  # fmt: skip
        if report.warning is not None:
            log.warning("step %d is saved, but: %s", report.step, report.warning)
            journal.write("cleaning_failed", step=report.step, error=report.warning)
