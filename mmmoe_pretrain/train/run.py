"""The steps of a run: batches in, optimizer steps, log lines and checkpoints out, and going back.

What ranks decide, they decide alike: from sums over all of them (``control.py``), or from a step's result,
which is equal on every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from mmmoe_pretrain import __version__, exit_codes
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.data.budget import BadBudget
from mmmoe_pretrain.data.loader import Loader, LoadStats, StepData
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.train import start
from mmmoe_pretrain.train.console import Console
from mmmoe_pretrain.train.control import Control, Notes, from_rank_0, number_of_rank_0
from mmmoe_pretrain.train.learning import Learning
from mmmoe_pretrain.train.metrics import MetricsLog
from mmmoe_pretrain.train.record import Recorder
from mmmoe_pretrain.train.replicas import check_replicas
from mmmoe_pretrain.train.restore import Restored, restore
from mmmoe_pretrain.train.rollback import BadSteps, Skips, Trouble, read_skips
from mmmoe_pretrain.train.saving import Saving
from mmmoe_pretrain.train.schedule import learning_rate
from mmmoe_pretrain.train.session import Session
from mmmoe_pretrain.train.signals import StopRequest
from mmmoe_pretrain.train.tally import Tally
from mmmoe_pretrain.train.watchdog import Watchdog

log = logging.getLogger(__name__)


class Run:
    """One rank's part of a run: ``begin`` once, then ``to_its_end``."""

    def __init__(self, session: Session, loader: Loader, stop: StopRequest, watchdog: Watchdog) -> None:
        self.session, self.loader, self.stop, self.watchdog = session, loader, stop, watchdog
        self.config, self.settings = session.config, session.config.train
        self.console = Console(self.settings.steps, enabled=session.main)
        self.saving = Saving(session, self.console.say)
        self.control = Control(session.host.control)
        self.budget = BadBudget(self.config.data.max_bad_fraction)
        self.samples = Tally()  # read since the start
        self.bad_steps = BadSteps(self.config)
        self.learning = Learning(self.config)
        self.skips = Skips()
        self.step = 0  # steps done
        self.save_owed = self.stopping = False
        self.recorder = Recorder(session.groups.data, session.groups.pipeline)
        self.metrics: MetricsLog | None = None

    def begin(self, found: Sequence[store.Checkpoint]) -> None:
        """Go on from the newest of ``found`` that is whole; where there is none, begin and save that, so that the
        run can always go back, and one that cannot save itself ends before it has trained."""
        session, journal = self.session, self.session.journal
        self.skips = from_rank_0(session.host.storage, lambda: read_skips(self.config.run_dir))
        self.watchdog.beat(0, "load")
        back_to = self.skips.back_to
        if found:
            restored = restore(session, [c for c in found if back_to is None or c.step <= back_to])
            self._take(restored)
            if back_to is not None:  # the processes ended while they went back
                self._rewind(restored)
            journal.write("resumed", step=self.step, path=str(restored.checkpoint), ranks=dist.get_world_size())
            if session.main:
                log.info("resumed from %s", restored.checkpoint)
        else:
            journal.write("started", step=0, ranks=dist.get_world_size(), version=__version__)
        from_rank_0(session.host.storage, lambda: start.write_config(self.config, session.codecs.text.fingerprint))
        self.loader.seek(self.step, self.skips.cursor)
        if not found:
            self.watchdog.beat(0, "save")
            self.saving.save_now(0, self.skips.cursor, self.samples, {})

    def to_its_end(self) -> int:
        """Train until all steps are done or the run is told to stop; the exit code."""
        if self.step >= self.settings.steps:
            if self.session.main:
                log.info("all %d steps are done; raise train.steps to train on", self.settings.steps)
            return exit_codes.DONE
        self.recorder.begin_interval()
        first = self.step
        with self.console:
            try:
                self._open_metrics()
                while (end := self._train()) is None:
                    pass
            finally:
                if self.metrics is not None:
                    self.metrics.close()
        self.saving.close()
        self.learning.refuse_nothing(whole_run=end == exit_codes.DONE and first == 0)
        self._tell_of_idle(self.learning.idle())
        if end == exit_codes.DONE:
            self.session.journal.write("finished", step=self.step)
        return end

    def _train(self) -> int | None:
        """Steps up to an end (its exit code) or up to going back (None)."""
        self.watchdog.beat(self.step + 1, "data")
        for data in self.loader:
            result, rate = self._step(data)
            trouble = self._judge(data, result)
            if trouble is not None:
                self._go_back(trouble)
                return None
            self._log(result, rate)
            self._watch_learning(result)
            self._save_if_due(result)
            if self.step < self.settings.steps and self.stopping:
                return self._stopped()
            self.watchdog.beat(self.step + 1, "data")
        return exit_codes.DONE

    def _step(self, data: StepData) -> tuple[StepResult, float]:
        """One optimizer step, and beside it what all ranks must know of each other."""
        self.saving.collect()
        rate = learning_rate(data.step, self.settings.steps, self.config.optimizer)
        self.control.begin(self._notes(data.stats))
        self.watchdog.beat(data.step + 1, "step" if self.recorder.steps else "compile")
        result = self.session.engine.step(data.microbatches, rate)
        self.step = data.step + 1
        self.recorder.add(result, data.stats)
        if self.config.faults.spike_threshold:  # tensor ranks may differ in the last bit, and must judge alike
            result.losses["total"] = number_of_rank_0(self.session.host.control, result.losses["total"])
        notes = self.control.finish()
        self.stopping = notes.stop > 0
        self._heed(notes)
        return result, rate

    def _notes(self, stats: LoadStats) -> Notes:
        self.budget.add(stats)
        counts = self.session.counts_samples
        return Notes(
            stop=float(self.stop.requested),
            read=stats.samples if counts else 0,
            bad=len(stats.bad) if counts else 0,
            cut_audio=stats.cut_audio if counts else 0,
            cut_text=stats.cut_text if counts else 0,
            failed_saves=self.saving.failures if self.session.main else 0,
            worker_restarts=stats.worker_restarts,
        )

    def _heed(self, notes: Notes) -> None:
        self.samples = self.samples.plus(notes)
        self.budget.judge(self.samples.bad, self.samples.read)
        if notes.worker_restarts:
            self.session.journal.write("worker_restarted", step=self.step, workers=round(notes.worker_restarts))
        if self.saving.too_many(round(notes.failed_saves)):
            self.watchdog.beat(self.step, "save")  # one may be in flight
            self.saving.give_up(round(notes.failed_saves))

    def _judge(self, data: StepData, result: StepResult) -> Trouble | None:
        """Journal a step that was left out or a spike; the trouble, where the run must go back."""
        trouble = self.bad_steps.add(data, result)
        journal = self.session.journal
        if result.skipped:
            journal.write("skipped_step", step=self.step, batch=data.batch, loss_scale=result.loss_scale)
            if self.session.main:
                log.warning("step %d is left out: loss or gradient not finite (batch %d)", self.step, data.batch)
        if trouble is None or trouble.kind != "spike":
            return trouble
        first, last = trouble.steps[0] + 1, trouble.steps[-1] + 1
        journal.write("spike", step=self.step, steps=[first, last], loss=result.losses["total"])
        if self.session.main:
            log.warning("steps %d to %d: %s", first, last, trouble.why)
        return trouble if self.config.faults.spike_action == "rollback" else None

    def _log(self, result: StepResult, rate: float) -> None:
        if not _due(self.step, self.settings.log_every, self.settings.steps):
            return
        record = self.recorder.record(self.step, result, rate, self.samples)  # on every rank
        self.console.update(record)
        if self.metrics is not None:
            self.metrics.write(record)

    def _watch_learning(self, result: StepResult) -> None:
        """Raises ValueError on every rank where nothing is learned at all."""
        found = self.learning.add(result)
        if found and self.session.main:
            log.info("step %d is the first with a loss for %s", self.step, ", ".join(found))
        self.learning.refuse_nothing()
        self._tell_of_idle(self.learning.warnings())

    def _tell_of_idle(self, idle: Mapping[str, str]) -> None:
        for name, why in idle.items():
            self.session.journal.write("idle_objective", step=self.step, loss=name, why=why)
            if self.session.main:
                log.warning("%s", why)

    def _check_replicas(self) -> None:
        """Raises Restartable on every rank where what must be equal is not."""
        engine = self.session.engine
        models = () if self.config.parallel.overlap_param_gather else engine.models  # some are of the step before
        report = check_replicas(engine.export_state(), self.session.host.control, models)
        if report.differing:
            self.session.journal.write("replica_mismatch", step=self.step, report=str(report))
            raise exit_codes.Restartable(
                f"step {self.step}: weights that must be equal are not: {report}. Memory or a device of these ranks "
                f"corrupts numbers; go on from the last checkpoint without those machines"
            )

    def _save_if_due(self, result: StepResult) -> None:
        """Where replicas are compared, they are before every save, too: damage must not come back with a restart."""
        last, every = self.step == self.settings.steps, self.config.faults.replica_check_every
        stops = self.stopping and not last
        self.save_owed |= self.step % self.config.checkpoint.every == 0
        due = self.save_owed and not self.bad_steps.in_streak  # what may have to be undone is not kept
        if every and (due or last or stops or self.step % every == 0):
            self._check_replicas()
        if last or stops:
            self.watchdog.beat(self.step, "save")
            self.saving.save_now(self.step, self.skips.cursor, self.samples, result.losses)
        elif due:
            self.watchdog.beat(self.step, "save")
            self.saving.save(self.step, self.skips.cursor, self.samples, result.losses)
            self.save_owed = False

    def _stopped(self) -> int:
        reason = self.stop.reason or "another rank"
        self.session.journal.write("preempted", step=self.step, reason=reason)
        self.console.say(f"stopped by {reason} after step {self.step} of {self.settings.steps}, which is saved")
        return exit_codes.STOPPED

    def _go_back(self, trouble: Trouble) -> None:
        """Load the last checkpoint before the trouble, and leave its batches out from there on."""
        session, faults = self.session, self.config.faults
        self.watchdog.beat(self.step, "load")
        batches = [self.skips.cursor.batch(step) for step in (trouble.steps[0], trouble.steps[-1])]
        story = (
            f"steps {trouble.steps[0] + 1} to {trouble.steps[-1] + 1} (batches {batches[0]} to {batches[1]}): "
            f"{trouble.why}"
        )
        if self.skips.rollbacks >= faults.max_rollbacks:
            named = f"; their first samples on this rank: {', '.join(trouble.keys)}" if trouble.keys else ""
            raise ValueError(
                f"{story}{named}. The run has gone back {self.skips.rollbacks} times, and faults.max_rollbacks is "
                f"{faults.max_rollbacks}. Lower optimizer.learning_rate, set optimizer.clip_norm or train in fp32, "
                f"leave out those samples if they are broken, or raise faults.max_rollbacks"
            )
        self.saving.wait()
        found = from_rank_0(session.host.storage, lambda: store.candidates(self.config.checkpoint_root))
        restored = restore(session, [c for c in found if c.step <= trouble.steps[0]])
        failed_at = self.step
        self._take(restored)
        window = self.skips.leave_out(trouble, faults.skip_margin, self.step)
        self.skips.back_to = self.step
        self._write_skips()  # a start after a crash from here on goes back to the same step
        self._rewind(restored)
        if session.main:
            log.error("%s; going back to step %d, batches %d to %d are left out", story, self.step, *window)
        session.journal.write(
            "rollback", step=failed_at, to_step=self.step, reason=trouble.why, skipped_batches=list(window),
            rollbacks=self.skips.rollbacks,
        )  # fmt: skip
        self.loader.seek(self.step, self.skips.cursor)
        self.bad_steps.forget()
        self.saving.forget()
        self.save_owed = False
        self._open_metrics()
        self.recorder.begin_interval()

    def _rewind(self, restored: Restored) -> None:
        """Delete the checkpoints behind ``restored``; the run has gone back when this returns."""
        from_rank_0(self.session.host.storage, lambda: store.rewind(restored.checkpoint))
        self.skips.back_to = None
        self._write_skips()

    def _write_skips(self) -> None:
        from_rank_0(self.session.host.storage, lambda: self.skips.write(self.config.run_dir))

    def _take(self, restored: Restored) -> None:
        self.step = restored.step
        self.console.stand_at(self.step)
        self.skips.add(restored.cursor)
        self.samples = restored.samples

    def _open_metrics(self) -> None:
        """The log from this step on; what stood behind it is dropped."""
        if self.session.main:
            if self.metrics is not None:
                self.metrics.close()
            self.metrics = MetricsLog(self.config.run_dir, self.step, self.settings.heatmap_every)


def _due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last
