"""What a run tells while it trains: the console, metrics.jsonl and TensorBoard, trackers, and held-out scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from mmmoe_pretrain.data.loader import LoadStats
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.models.costs import model_costs
from mmmoe_pretrain.parallel.agreement import agree, from_rank_0
from mmmoe_pretrain.plan.machines import Machine, machine_of
from mmmoe_pretrain.train.checkpointing import RunContext
from mmmoe_pretrain.train.console import Console, describe_held_out
from mmmoe_pretrain.train.held_out import HeldOutScores, Validation
from mmmoe_pretrain.train.metrics import Compute, MetricsLog, Recorder, SampleCounts, StepRecord, record_of
from mmmoe_pretrain.train.planned import Comparison, PlanInBackground, arguments
from mmmoe_pretrain.train.scalars import scalars
from mmmoe_pretrain.train.summary import summary
from mmmoe_pretrain.train.trackers.feed import Feeds
from mmmoe_pretrain.train.watchdog import Watchdog


class Reporter:
    """Every rank has one and calls the same methods; rank 0 writes."""

    def __init__(self, context: RunContext, watchdog: Watchdog, validation: Validation | None) -> None:
        self._context, self._watchdog, self._validation = context, watchdog, validation
        self._settings, self._machine = context.config.train, _machine(context)
        self.console = Console(self._settings.steps, enabled=context.main)
        groups, compute = context.groups, Compute(model_costs(context.config).training, self._peak_flops())
        device = context.engine.device
        self._recorder = Recorder(
            groups.data, context.host.pipeline, context.host.control, device, compute, context.before_model
        )
        self._metrics: MetricsLog | None = None
        self._trackers = Feeds((), context.config.run_dir)
        self._comparison = Comparison(None)

    def _peak_flops(self) -> float:
        """A second, of the devices of all ranks in the precision of the run; 0 where their kind is not known."""
        if self._machine is None:
            return 0.0
        return self._machine.peak[self._settings.precision] * self._context.layout.world_size

    def begin(self, step: int) -> None:
        """``step``: how many are done. Collective."""
        context = self._context
        self._recorder.begin_steps()
        for line in summary(context, step):
            self.console.say(line)
        self._trackers = Feeds(context.config.trackers.named if context.main else (), context.config.run_dir)
        gpu = None if self._machine is None else self._machine.name
        told = arguments(context.config, context.layout.world_size, gpu)
        if context.main and told is not None:
            self._comparison = Comparison(PlanInBackground.of(told))

    def open(self, step: int) -> None:
        """Records of steps after ``step`` follow; those that are there are dropped. Collective."""
        agree(self._context.host.storage, lambda: self._open(step))
        self._recorder.begin_interval()

    def _open(self, step: int) -> None:
        if not self._context.main:
            return
        if self._metrics is not None:
            self._metrics.close()
        self._metrics = MetricsLog(self._context.config.run_dir, step, self._settings.heatmap_every)

    @property
    def has_steps(self) -> bool:
        """Whether this process has done a step."""
        return self._recorder.steps > 0

    def add(self, result: StepResult, stats: LoadStats) -> None:
        """Count a step."""
        self._recorder.add(result, stats)

    def log(
        self, step: int, result: StepResult, learning_rate: float, samples: SampleCounts, stop: Callable[[], bool]
    ) -> HeldOutScores | None:
        """Log ``step`` where that is due, and always the first one of the run; its held-out scores where they are due
        and ``stop()``, equal on all ranks, does not end them. Collective."""
        due = self._scores_due(step)
        shown = due or step == self._settings.steps or step % self._settings.log_every == 0
        if not shown and self._recorder.steps == 1:
            self.console.first_step(step, result.losses, self._recorder.seconds)
        if not shown and step > 1:
            return None
        record = self._recorder.record(step, result, learning_rate, samples)
        if shown:
            self.console.update(record)
        else:
            self.console.set_step(step)  # the next record is of the steps after it
        if due:
            record = dataclasses.replace(record, held_out=self._score(step, stop))
        if self._metrics is not None:
            record = self._beside_plan(record)
            values = self._metrics.write(record)
            if not due or record.held_out is not None:  # else they get it with its scores, after the resume
                self._trackers.write(step, scalars(values))
        return record.held_out

    def owes_scores(self, step: int) -> bool:
        """Whether the held-out scores of ``step``, from which this start resumes, are due and not in its record: the
        run was stopped before it had them. Collective."""
        if not self._scores_due(step):
            return False
        path = self._context.config.run_dir / "metrics.jsonl"

        def missing() -> bool:
            record = record_of(path, step)
            return record is not None and "held_out" not in record

        return from_rank_0(self._context.host.control, missing)

    def add_scores(self, step: int, stop: Callable[[], bool]) -> HeldOutScores | None:
        """Make the scores that ``step`` owes, and put them into its record; None where ``stop()`` ends it.
        Collective."""
        found = self._score(step, stop)
        if found is not None and self._metrics is not None:
            values = self._metrics.add_held_out(step, found)
            if values is not None:
                self._trackers.write(step, scalars(values))
        return found

    def _scores_due(self, step: int) -> bool:
        every = self._context.config.evaluate.every
        return self._validation is not None and step > 0 and (step == self._settings.steps or step % every == 0)

    def _score(self, step: int, stop: Callable[[], bool]) -> HeldOutScores | None:
        assert self._validation is not None
        found = self._validation.score(self._context.engine, self._watchdog, step, stop)
        self._recorder.begin_interval()  # its time does not count as training's
        if found is None:
            self.console.say(f"step {step}: no held-out scores, since the run stops; they are made when it resumes")
        else:
            self.console.say(describe_held_out(step, found))
        return found

    def _beside_plan(self, record: StepRecord) -> StepRecord:
        """On rank 0: tell the plan when it is ready, and from then on have it in the records."""
        left = self._settings.steps - record.step
        for line in self._comparison.add(left, record.tokens_per_second, record.memory):
            self.console.say(line)
        return dataclasses.replace(record, planned=self._comparison.planned)

    def close_log(self) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def close_trackers(self, finished: bool) -> None:
        """May take seconds."""
        self._trackers.close(finished=finished)
        for line in self._comparison.close():
            self.console.say(line)


def _machine(context: RunContext) -> Machine | None:
    """Of the GPU; None of others, and of a CPU."""
    device = context.engine.device
    return machine_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
