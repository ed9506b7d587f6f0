"""The steps of a run, with their log records, checkpoints and rollbacks.

The data of a step is a pure function of its number and of the skipped batches, so a run resumes by starting at a
later step with the state of a checkpoint. All ranks decide equally: from sums over them, or from a step's result,
which is equal on every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from mmmoe_pretrain import __version__, exit_codes
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.data.budget import BadBudget
from mmmoe_pretrain.data.loader import Loader, StepData
from mmmoe_pretrain.data.sources import stream_state
from mmmoe_pretrain.data.sources.listing import is_stream
from mmmoe_pretrain.data.sources.survey import changes, sizes_of
from mmmoe_pretrain.data.workers.replica import ReplicaLoader
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.parallel.agreement import (
    BackgroundSum,
    any_rank,
    exchange,
    from_rank_0,
    number_from_rank_0,
)
from mmmoe_pretrain.train import cpu, start
from mmmoe_pretrain.train.checkpointing import CheckpointManager, DataState, Restored, RunContext, restore
from mmmoe_pretrain.train.held_out import HeldOutScores, Validation
from mmmoe_pretrain.train.learning import ObjectiveMonitor
from mmmoe_pretrain.train.metrics import SampleCounts
from mmmoe_pretrain.train.profiling import StepProfiler
from mmmoe_pretrain.train.replicas import check_replicas
from mmmoe_pretrain.train.reporting import Reporter
from mmmoe_pretrain.train.rollback import BadSteps, FaultDetector, SkippedBatches, read_skipped_batches
from mmmoe_pretrain.train.schedule import learning_rate
from mmmoe_pretrain.train.signals import StopRequest
from mmmoe_pretrain.train.watchdog import Watchdog

log = logging.getLogger(__name__)


MOST_CHANGES = 4  # that a warning names


class Trainer:
    """One rank's part of a run: ``load`` once, then ``train``."""

    def __init__(
        self,
        context: RunContext,
        loader: Loader | ReplicaLoader,
        stop: StopRequest,
        watchdog: Watchdog,
        validation: Validation | None,
    ) -> None:
        self.context, self.loader, self.stop, self.watchdog = context, loader, stop, watchdog
        self.config, self.settings = context.config, context.config.train
        self.reporter = Reporter(context, watchdog, validation)
        self.console = self.reporter.console
        self.checkpoints = CheckpointManager(context, self.console.say)
        self.status_sum = BackgroundSum(context.host.control)
        self.budget = BadBudget(self.config.data.max_bad_fraction)
        self.samples = SampleCounts()
        self.losses: dict[str, float] = {}  # of the checkpoint from which this start or rollback resumed
        self.streams: stream_state.Table = {}  # as that checkpoint has them
        self.sizes = sizes_of([source.path for source in self.config.data.train], loader.sources)
        self.has_streams = any(is_stream(source.path) for source in self.config.data.train)
        self.faults = FaultDetector(self.config)
        self.objectives = ObjectiveMonitor(self.config)
        self.skipped = SkippedBatches()
        self.step = 0  # steps done
        self.save_due = self.stopping = False
        self.profiler = StepProfiler(self.settings.profile, self.config.run_dir, context.engine.device)

    def load(self, found: Sequence[store.Checkpoint]) -> None:
        """Resume from the newest of ``found`` that is intact. Without any, start from step 0 and save that first: a
        run can then always roll back, and one that cannot save ends before it has trained."""
        context, journal = self.context, self.context.journal
        facts = {"ranks": dist.get_world_size(), **cpu.facts(context.engine.device)}
        self.skipped = from_rank_0(context.host.storage, lambda: read_skipped_batches(self.config.run_dir))
        self.watchdog.beat(0, "load")
        rollback_step = self.skipped.back_to
        if found:
            restored = restore(context, [c for c in found if rollback_step is None or c.step <= rollback_step])
            self._take_over(restored)
            if rollback_step is not None:  # the processes ended in the middle of a rollback
                self._finish_rollback(restored)
            journal.write("resumed", step=self.step, path=str(restored.checkpoint), **facts)
            context.log.info("resumed from %s", restored.checkpoint)
        else:
            journal.write("started", step=0, version=__version__, **facts)
        from_rank_0(context.host.storage, lambda: start.write_config(self.config, context.modalities.fingerprint))
        self._seek()
        if not found:
            self.watchdog.beat(0, "save")
            self.checkpoints.save_and_wait(0, self._data_state(), {})

    def train(self) -> int:
        """Train until all steps are done or a stop is requested; the exit code."""
        first, code = self.step, None
        owed = self.reporter.owes_scores(first)  # by a start that was stopped
        if first >= self.settings.steps and not owed:
            self.context.log.info("all %d steps are done; raise train.steps to continue", self.step)
            return exit_codes.DONE
        self.reporter.begin(first)
        with self.console:
            try:
                self.reporter.open(first)
                code = self._add_scores() if owed else None
                while code is None:
                    code = self._train_until_rollback()
            finally:
                self.reporter.close_log()
                self.watchdog.beat(self.step, "save")
                self.profiler.close(self.step)
                self.reporter.close_trackers(finished=code == exit_codes.DONE)
        self.checkpoints.close()
        self.objectives.raise_if_all_idle(whole_run=code == exit_codes.DONE and first == 0)
        self._report_idle(self.objectives.idle())
        if code == exit_codes.DONE:
            self.context.journal.write("finished", step=self.step)
        return code

    def _train_until_rollback(self) -> int | None:
        """The exit code of the run, or None after a rollback."""
        if self._stops():  # e.g. before a rank failed, and torchrun has started these: this step is saved
            return self._stopped()
        self._begin("data")
        for data in self.profiler.steps(self.loader, lambda: self.step, self._begin):
            result, rate = self._train_step(data)
            bad_steps = self._find_fault(data, result)
            if bad_steps is not None:
                self._roll_back(bad_steps)
                return None
            held_out = self.reporter.log(self.step, result, rate, self.samples, self._stops)
            self._check_objectives(result)
            self._save_if_due(result, held_out)
            if self.stopping and (self.step < self.settings.steps or self.reporter.owes_scores(self.step)):
                return self._stopped()
            self._begin("data")
        return exit_codes.DONE

    def _stops(self) -> bool:
        """Whether a rank was asked to stop; equal on every rank. Collective."""
        self.stopping = self.stopping or any_rank(self.context.host.control, self.stop.requested)
        return self.stopping

    def _add_scores(self) -> int | None:
        """Make the held-out scores that this step owes; the exit code where a stop ends them, too."""
        held_out = self.reporter.add_scores(self.step, self._stops)
        if held_out is None:
            return self._stopped()
        if self.checkpoints.best_by_held_out and self.step % self.config.checkpoint.every == 0:
            self.watchdog.beat(self.step, "save")
            self.checkpoints.save(self.step, self._data_state(), self.losses, held_out)  # again, with its metric
        return None

    def _begin(self, phase: str) -> None:
        """Of the next step."""
        self.watchdog.beat(self.step + 1, phase)

    def _train_step(self, data: StepData) -> tuple[StepResult, float]:
        """One optimizer step, while the ranks' status is summed; the result and the learning rate."""
        self.checkpoints.poll()
        rate = learning_rate(data.step, self.settings.steps, self.config.optimizer)
        status = self._status(data)
        self.status_sum.start(list(status.values()))
        self.watchdog.beat(data.step + 1, "step" if self.reporter.has_steps else "compile")
        result = self.context.engine.step(data.microbatches, rate)
        self.step = data.step + 1
        self.reporter.add(result, data.stats)
        if self.config.faults.spike_threshold:  # tensor ranks may differ in the last bit, but must decide equally
            result.losses["total"] = number_from_rank_0(self.context.host.control, result.losses["total"])
        sums = {name: round(total) for name, total in zip(status, self.status_sum.wait(), strict=True)}
        self._act_on(sums, result.tokens)
        return result, rate

    def _status(self, data: StepData) -> dict[str, float]:
        """Numbers of this rank; their sums over all ranks are exchanged in every step. Samples are counted by the
        rank of a replica that reads them, failed saves by rank 0; the others report 0."""
        stats = data.stats
        self.budget.add(stats)
        return {
            "stop requests": self.stop.requested,
            "failed saves": self.checkpoints.failures if self.context.main else 0,  # in a row
            "worker restarts": stats.worker_restarts,  # since the step before
            "read": stats.samples,
            "bad": len(stats.bad),
            **{f"cut {name}": stats.cut[name] for name in self.context.modalities},
        }

    def _act_on(self, status: dict[str, int], tokens: int) -> None:
        """``status`` and ``tokens``: of all ranks. Raises ValueError past the budgets of bad samples and failed
        saves."""
        self.stopping = status["stop requests"] > 0
        cut = {name: status[f"cut {name}"] for name in self.context.modalities if status[f"cut {name}"]}
        self.samples += SampleCounts(status["read"], status["bad"], cut, tokens)
        self.budget.check(self.samples.bad, self.samples.read)
        if status["worker restarts"]:
            self.context.journal.write("worker_restarted", step=self.step, workers=status["worker restarts"])
        if self.checkpoints.too_many(status["failed saves"]):
            self.watchdog.beat(self.step, "save")  # one may be in flight
            self.checkpoints.give_up(status["failed saves"])

    def _find_fault(self, data: StepData, result: StepResult) -> BadSteps | None:
        """Journal a skipped step or a spike; the steps to roll back, if any."""
        bad_steps = self.faults.add(data, result)
        journal = self.context.journal
        if result.skipped:
            journal.write("skipped_step", step=self.step, batch=data.batch, loss_scale=result.loss_scale)
            text = "step %d is skipped: loss or gradient not finite (batch %d)"
            self.context.log.warning(text, self.step, data.batch)
        if bad_steps is None or bad_steps.kind != "spike":
            return bad_steps
        first, last = bad_steps.steps[0] + 1, bad_steps.steps[-1] + 1
        journal.write("spike", step=self.step, steps=[first, last], loss=result.losses["total"])
        self.context.log.warning("steps %d to %d: %s", first, last, bad_steps.reason)
        return bad_steps if self.config.faults.spike_action == "rollback" else None

    def _check_objectives(self, result: StepResult) -> None:
        """Raises ValueError on every rank where nothing is learned at all."""
        found = self.objectives.add(self.step - 1, result)
        if found:
            self.context.log.info("step %d is the first with a loss for %s", self.step, ", ".join(found))
        self.objectives.raise_if_all_idle()
        self._report_idle(self.objectives.warnings())

    def _report_idle(self, idle: Mapping[str, str]) -> None:
        for name, reason in idle.items():
            self.context.journal.write("idle_objective", step=self.step, loss=name, why=reason)
            self.context.log.warning("%s", reason)

    def _check_replicas(self) -> None:
        """Raises Restartable on every rank where replicas differ."""
        engine = self.context.engine
        models = () if self.config.parallel.overlap_param_gather else engine.models  # some are of the step before
        report = check_replicas(engine.export_state(), self.context.host.control, models)
        if report.differing:
            self.context.journal.write("replica_mismatch", step=self.step, report=str(report))
            raise exit_codes.Restartable(
                f"step {self.step}: weights that must be equal are not: {report}. Memory or a device of these ranks "
                f"corrupts numbers; resume from the last checkpoint without those machines"
            )

    def _save_if_due(self, result: StepResult, held_out: HeldOutScores | None) -> None:
        """If replicas are compared, they are also compared before every save, so that no corruption is saved."""
        last, every = self.step == self.settings.steps, self.config.faults.replica_check_every
        stops = self.stopping and not last
        self.save_due |= self.step % self.config.checkpoint.every == 0
        due = self.save_due and not self.faults.in_streak  # steps that may be rolled back are not saved
        if every and (due or last or stops or self.step % every == 0):
            self._check_replicas()
        if not (due or last or stops):
            return
        self.watchdog.beat(self.step, "save")
        save = self.checkpoints.save_and_wait if last or stops else self.checkpoints.save
        save(self.step, self._data_state(), result.losses, held_out)
        self.save_due = False

    def _stopped(self) -> int:
        reason = self.stop.reason or "another rank"
        self.context.journal.write("preempted", step=self.step, reason=reason)
        self.console.say(f"stopped by {reason} after step {self.step} of {self.settings.steps}, which is saved")
        return exit_codes.STOPPED

    def _roll_back(self, bad_steps: BadSteps) -> None:
        """Load the last checkpoint before ``bad_steps``, and skip their batches from there on."""
        context, faults, skipped = self.context, self.config.faults, self.skipped
        self.watchdog.beat(self.step, "load")
        story = bad_steps.describe(skipped.cursor)
        if skipped.rollbacks >= faults.max_rollbacks:
            keys = f"; their first samples on this rank: {', '.join(bad_steps.keys)}" if bad_steps.keys else ""
            raise ValueError(
                f"{story}{keys}. Rollbacks so far: {skipped.rollbacks}, and faults.max_rollbacks is "
                f"{faults.max_rollbacks}. Lower optimizer.learning_rate, set optimizer.clip_norm or train in fp32, "
                f"remove those samples if they are broken, or raise faults.max_rollbacks"
            )
        self.checkpoints.wait()
        found = from_rank_0(context.host.storage, lambda: store.candidates(self.config.checkpoint_root))
        restored = restore(context, [c for c in found if c.step <= bad_steps.steps[0]])
        failed_at = self.step
        self._take_over(restored)
        window = skipped.skip(bad_steps, faults.skip_margin, self.step)
        skipped.back_to = self.step
        self._write_skipped()  # a start after a crash from here on rolls back to the same step
        self._finish_rollback(restored)
        context.log.error("%s; rolled back to step %d, batches %d to %d are skipped", story, self.step, *window)
        context.journal.write(
            "rollback", step=failed_at, to_step=self.step, reason=bad_steps.reason, skipped_batches=list(window),
            rollbacks=skipped.rollbacks,
        )  # fmt: skip
        self._seek()
        self.faults.reset()
        self.profiler.drop()
        self.checkpoints.after_rollback()
        self.save_due = False
        self.reporter.open(self.step)

    def _finish_rollback(self, restored: Restored) -> None:
        """Delete the checkpoints after ``restored``."""
        from_rank_0(self.context.host.storage, lambda: store.rewind(restored.checkpoint))
        self.skipped.back_to = None
        self._write_skipped()

    def _write_skipped(self) -> None:
        from_rank_0(self.context.host.storage, lambda: self.skipped.write(self.config.run_dir))

    def _take_over(self, restored: Restored) -> None:
        self.step = restored.step
        self.console.set_step(self.step)
        self.skipped.add(restored.data.cursor)
        self.samples, self.losses = restored.data.samples, restored.losses
        self.streams = restored.data.streams
        if (order := self._order()) and restored.data.order not in ("", order):
            found = [*changes(restored.data.sizes, self.sizes), *restored.data.changes]
            more = [f"and {len(found) - MOST_CHANGES} more"] if len(found) > MOST_CHANGES else []
            self.context.log.warning(
                "data.train is not what %s was trained on: the order of the data changes; samples may be repeated or "
                "never read (%s)", restored.checkpoint,
                "; ".join([*found[:MOST_CHANGES], *more]) or "its shards or their measured lengths differ",
            )  # fmt: skip

    def _seek(self) -> None:
        for warning in self.loader.seek(self.step, self.skipped.cursor, self.streams):
            self.context.log.warning("%s", warning)

    def _data_state(self) -> DataState:
        """Collective where there are streams: each rank knows how far it has read them."""
        states: stream_state.Table = {}
        if self.has_streams:
            states = exchange(self.context.host.control, lambda: self.loader.stream_states, stream_state.merged)
        return DataState(self.skipped.cursor, self.samples, states, self._order(), self.sizes)

    def _order(self) -> str:
        """What the order of the batches up to this step depends on; empty on a rank that does not read."""
        return self.loader.digest(self.skipped.cursor.batch(self.step)) or ""
