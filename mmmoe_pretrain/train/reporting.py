"""What a run tells while it trains: the console, metrics.jsonl and TensorBoard, trackers, and held-out scores."""

from __future__ import annotations

import dataclasses

import torch

from mmmoe_pretrain.data.loader import LoadStats
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.models.costs import model_costs
from mmmoe_pretrain.parallel.agreement import agree
from mmmoe_pretrain.plan.machines import Machine, machine_of
from mmmoe_pretrain.train.checkpointing import RunContext
from mmmoe_pretrain.train.console import Console, describe_held_out
from mmmoe_pretrain.train.held_out import HeldOutScores, Validation
from mmmoe_pretrain.train.metrics import Compute, MetricsLog, Recorder, SampleCounts, StepRecord, scalars
from mmmoe_pretrain.train.planned import PlanInBackground, Planned, arguments
from mmmoe_pretrain.train.summary import summary
from mmmoe_pretrain.train.telemetry import number
from mmmoe_pretrain.train.trackers.feed import Feeds
from mmmoe_pretrain.train.watchdog import Watchdog


class Reporter:
    """Every rank has one and calls the same methods; rank 0 writes."""

    def __init__(self, context: RunContext, watchdog: Watchdog, validation: Validation | None) -> None:
        self._context, self._watchdog, self._validation = context, watchdog, validation
        self._settings, self._machine = context.config.train, _machine(context)
        self.console = Console(self._settings.steps, enabled=context.main)
        groups, compute = context.groups, Compute(model_costs(context.config).training, self._peak_flops())
        self._recorder = Recorder(groups.data, groups.pipeline, context.host.control, context.engine.device, compute)
        self._metrics: MetricsLog | None = None
        self._trackers = Feeds((), context.config.run_dir)
        self._plan: PlanInBackground | None = None
        self._planned: Planned | None = None

    def _peak_flops(self) -> float:
        """A second, of the devices of all ranks in the precision of the run; 0 where their kind is not known."""
        if self._machine is None:
            return 0.0
        return self._machine.peak[self._settings.precision] * self._context.layout.world_size

    def begin(self, step: int) -> None:
        """``step``: how many are done. Collective."""
        context = self._context
        for line in summary(context, step):
            self.console.say(line)
        self._trackers = Feeds(context.config.trackers.named if context.main else (), context.config.run_dir)
        gpu = None if self._machine is None else self._machine.name
        told = arguments(context.config, context.layout.world_size, gpu)
        if context.main and told is not None:
            self._plan = PlanInBackground.of(told)

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
        self, step: int, result: StepResult, learning_rate: float, samples: SampleCounts, stopping: bool
    ) -> HeldOutScores | None:
        """Log ``step`` where that is due; its held-out scores where they are. Collective."""
        last, validation = step == self._settings.steps, self._validation
        every = self._context.config.evaluate.every
        scored = validation is not None and (last or (step % every == 0 and not stopping))
        if step % self._settings.log_every and not last and not scored:
            if self._recorder.steps == 1:
                self.console.first_step(step, result.losses, self._recorder.seconds)
            return None
        record = self._recorder.record(step, result, learning_rate, samples)
        self.console.update(record)
        if scored and validation is not None:
            found = validation.score(self._context.engine, self._watchdog, step)
            self.console.say(describe_held_out(step, found))
            record = dataclasses.replace(record, held_out=found)
            self._recorder.begin_interval()  # its time does not count as training's
        if self._metrics is not None:
            record = self._beside_plan(record)
            self._metrics.write(record)
            self._trackers.write(record.step, {name: number(value) for name, value in scalars(record)})
        return record.held_out

    def _beside_plan(self, record: StepRecord) -> StepRecord:
        """On rank 0: tell the plan when it is ready, and from then on have it in the records."""
        found = None if self._plan is None else self._plan.poll(self._settings.steps - record.step)
        if found is not None:
            self._planned = found
            for line in (*found.lines, found.beside(record.tokens_per_second, record.memory)):
                self.console.say(line)
        return dataclasses.replace(record, planned=self._planned)

    def close_log(self) -> None:
        if self._metrics is not None:
            self._metrics.close()

    def close_trackers(self, finished: bool) -> None:
        """May take seconds."""
        self._trackers.close(finished=finished)
        if self._plan is not None:
            self._plan.close()


def _machine(context: RunContext) -> Machine | None:
    """Of the GPU; None of others, and of a CPU."""
    device = context.engine.device
    return machine_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
