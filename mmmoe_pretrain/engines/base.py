"""The engine interface between the training loop and megatron-core or DeepSpeed, and the code that all engines share.

An engine owns gradient reduction, clipping and the optimizer step. It exports and imports its state by logical
parameter name, so that checkpoints are independent of engine and layout.

All engines scale their fp16 losses by one dynamic loss scale (arXiv 1710.03740). megatron-core has the same rule in
its ``DynamicGradScaler``, but one per optimizer: after an overflow of one of them, dense parameters and experts would
be unscaled by different numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint.state import ShardedState
from mmmoe_pretrain.config import LossScaleConfig, RunConfig, TrainConfig
from mmmoe_pretrain.engines.ahead import CopiedAhead, copy_stream
from mmmoe_pretrain.engines.idle import Corrections, correct_first, put_back
from mmmoe_pretrain.engines.state import EngineState, Held
from mmmoe_pretrain.engines.task_gradients import Gradients, TaskGradients
from mmmoe_pretrain.models.pretraining import REST, LossReport, PretrainingModel, Purpose
from mmmoe_pretrain.models.task_parameters import SHARED, own_parameters
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.objectives import Objectives, Outputs, StepCounts, step_counts
from mmmoe_pretrain.parallel.collectives import group_size
from mmmoe_pretrain.parallel.groups import Groups

CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_
HALF_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of the trunk, by train.precision


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step over all its microbatches and data-parallel ranks, equal on every rank. The
    gradient is that of ``losses["total"]``.

    ``routing`` holds sums over all of them, of the MoE layers on this rank's stages. ``grad_norm`` is the
    norm before clipping, over all parameters of the model, experts included. ``balance``: see
    ``PretrainingModel.balance``; of this rank's stages.
    """

    losses: dict[str, float]
    grad_norm: float
    counts: StepCounts  # that the losses were divided by
    routing: tuple[RoutingStats, ...]
    skipped: bool = False  # loss or gradient was not finite: weights, moments and routers are unchanged
    loss_scale: float = 1.0  # that the gradient was computed with (fp16)
    balance: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return self.counts.tokens


@dataclass(frozen=True)
class LossScale:
    """The state of fp16's dynamic loss scale."""

    scale: float
    good_steps: int  # without overflow since the last change
    hysteresis: int  # overflows left before the scale halves


@dataclass(frozen=True)
class Progress:
    """The counts of an engine, saved in a checkpoint's ``meta.json``. Skipped steps are steps but not updates; Adam's
    bias correction uses updates."""

    steps: int
    updates: int
    loss_scale: LossScale | None = None

    @property
    def scale(self) -> float:
        """The factor of the losses."""
        return 1.0 if self.loss_scale is None else self.loss_scale.scale

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progress:
        scale = value["loss_scale"]
        return cls(value["steps"], value["updates"], None if scale is None else LossScale(**scale))


class Engine(ABC):
    """Steps ``models``: the stages of this rank in the order of the forward pass, with their working weights. A
    subclass has ``_state``, ``step`` and ``_forward``, and calls ``_begin_update`` before it writes steady tensors of
    ``export_state``."""

    _state: EngineState

    def __init__(self, models: Sequence[PretrainingModel], config: RunConfig, device: torch.device) -> None:
        self.config, self.device, self.groups = config, device, models[0].groups
        self.models = [model.to(device) for model in models]
        self._copies = copy_stream(device)
        self._progress = first_progress(config.train)
        self._before_update: Callable[[], object] | None = None
        self._conflicts: dict[str, Tensor] = {}  # of the step: ``TaskGradients.combined``

    @abstractmethod
    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over the microbatches of this rank."""

    def evaluate(
        self, microbatches: list[Batch], observe: Callable[[Outputs], None]
    ) -> tuple[dict[str, float], StepCounts]:
        """The losses of a step on the current weights, as ``StepResult`` has them, and what they were divided by:
        without noise in routing, and nothing is updated. ``observe`` gets the outputs of each microbatch, in their
        order, on the ranks of the last stage."""
        counts = step_counts(microbatches, self.models[0].objectives, self.groups.data, self.device)
        for model in self.models:
            model.eval()
            model.observe = observe
        with torch.no_grad():
            self._prepare_losses(microbatches, counts)
            reports = self._forward(microbatches, counts)
        for model in self.models:
            model.train()
            model.observe = None
            model.end_step(None)
        return losses_of(self._loss_sums(reports).tolist(), self.models[0].loss_names, self.groups), counts

    @abstractmethod
    def _forward(self, microbatches: list[Batch], counts: StepCounts) -> list[LossReport]:
        """Forward passes alone; of each stage of this rank, the sums of its reports."""

    @property
    def steps_done(self) -> int:
        """Steps done, skipped ones included."""
        return self._progress.steps

    def progress(self) -> Progress:
        """The progress of this engine."""
        return self._progress

    def export_state(self) -> ShardedState:
        """This rank's part of weights, buffers and optimizer state; views of live memory, not copies."""
        return self._state.export()

    def import_state(self, state: ShardedState, progress: Progress) -> None:
        """Import a state with the same pieces as ``export_state``, and resume after ``progress.steps``."""
        self._begin_update()
        self._progress = resumed(progress, self.config.train)
        self._state.load(state, progress.updates)

    def before_update(self, call: Callable[[], object]) -> None:
        """Have ``call()`` run once, before weights and optimizer state change next; forward and backward passes run
        before it. For what still reads the steady tensors of ``export_state``."""
        self._before_update = call

    def _begin_update(self) -> None:
        call, self._before_update = self._before_update, None
        if call is not None:
            with record_function("before_update"):
                call()

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Logical shapes by name, of the parameters of this rank's stages."""
        return self._state.shapes()

    def _prepare_losses(self, microbatches: list[Batch], counts: StepCounts) -> None:
        """The passes without gradients that come before the one with: of the teacher, and for losses that are of all
        microbatches of a step."""
        objectives = self.models[0].objectives
        if objectives.taught:
            with record_function("teach"), self._averaged():
                self._look(microbatches, counts, "teaching")
        if objectives.whole_step:
            with record_function("collect"):
                self._look(microbatches, counts, "collecting")

    def _look(self, microbatches: list[Batch], counts: StepCounts, purpose: Purpose) -> None:
        for model in self.models:
            model.begin_look(purpose)
        with torch.no_grad():
            self._forward(microbatches, counts)
        for model in self.models:
            model.end_look()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model has the average of its weights."""
        self._begin_update()
        self._state.swap_average()
        try:
            yield
        finally:
            self._state.swap_average()

    @contextlib.contextmanager
    def _tasks_enter_and_leave(self) -> Iterator[None]:
        """Inside, the optimizer updates the weights: those that tasks without weight have alone stay as they are, and
        those of tasks that enter begin as in a new run (``idle.py``)."""
        step, update = self.steps_done, self._progress.updates + 1
        tasks = self.models[0].objectives
        names = _entering(tasks, step, step - self._progress.updates), _idle(tasks, step)
        entering, idle = (self._held_of(its) for its in names)
        corrections = Corrections.at(update, self.config.optimizer) if entering else None
        before = [[[tensor.clone() for tensor in its] for its in held] for held in (entering, idle)]
        yield
        for now, kept in zip(entering, before[0], strict=True):
            if corrections is not None:
                correct_first(now, kept, corrections)
        for now, kept in zip(idle, before[1], strict=True):
            put_back(now, kept)
        if any(names):
            self._state.publish()  # collective, so also on ranks that hold none of them

    def _held_of(self, tasks: Collection[str]) -> list[Held]:
        if not tasks:
            return []
        return self._state.held({parameter for model in self.models for parameter in own_parameters(model, tasks)})

    def _by_tasks(
        self, run: Callable[[], list[LossReport]], clear: Callable[[], None], gradients: Callable[[], Gradients]
    ) -> list[LossReport]:
        """Forward and backward passes of a step, of each stage of this rank the sums of its reports: by ``run()``,
        or in a step that takes the gradient of each task alone by one ``run()`` for each. After these the engine's
        gradients are those of the step. ``clear`` resets what ``gradients`` returns."""
        settings, step = self.config.train.task_gradients, self.steps_done
        self._conflicts = {}
        passes: tuple[str, ...] = ()
        if settings is not None and (step + 1) % settings.every_of(self.config.train.log_every) == 0:
            passes = self.models[0].passes(step)
        if settings is None or not passes:
            return run()
        found = TaskGradients(self.groups, self.device, settings.combine, (self.config.seed, step))
        sums: list[LossReport] = []
        for number, task in enumerate(passes):
            for model in self.models:
                model.begin_pass(task, first=number == 0)
            if number:
                clear()
            with record_function(f"pass of {task}"):
                reports = run()
            found.add(None if task == REST else task, gradients())
            sums = [LossReport(a.losses | b.losses, a.routing) for a, b in zip(sums or reports, reports, strict=True)]
        for model in self.models:
            model.begin_pass(None)
        self._conflicts = found.combined(gradients())
        return sums

    def _shared(self) -> set[nn.Parameter]:
        """The parameters of this rank that all tasks share."""
        return {p for model in self.models for name, p in model.named_parameters() if name.startswith(SHARED)}

    def _update_average(self) -> None:
        """After an update."""
        settings = self.config.optimizer
        if settings.average is not None:
            self._state.update_average(settings.average_at(self.steps_done))

    def _on_device(self, batches: Sequence[Batch]) -> CopiedAhead:
        return CopiedAhead(batches, self.device, self._copies)

    def _loss_sums(self, reports: Sequence[LossReport]) -> Tensor:
        return loss_sums(reports, self.models[0].loss_names, self.groups, self.device)

    def _read(self, sums: Tensor, more: Tensor) -> tuple[dict[str, float], list[float], bool]:
        """The losses of ``_loss_sums``, the numbers ``more`` [n], and whether all of them are finite on every rank of
        the job. The host waits for the results of a step here alone."""
        numbers = torch.cat([sums, more.to(sums.dtype)])
        *values, bad = torch.cat([numbers, not_finite(numbers, self.groups).to(sums.dtype)]).tolist()
        losses = losses_of(values[: len(sums)], self.models[0].loss_names, self.groups)
        return losses, values[len(sums) :], not bad

    def _gradient_factor(self, norm: float) -> float:
        """Unscales gradients and clips them to ``clip_norm`` (0: does not), ``norm`` being the unscaled one."""
        limit = self.config.optimizer.clip_norm
        return (min(1.0, limit / (norm + CLIP_EPS)) if limit else 1.0) / self._progress.scale

    def _end_step(
        self, reports: Sequence[LossReport], losses: dict[str, float], norm: float, counts: StepCounts, skipped: bool
    ) -> StepResult:
        for model, report in zip(self.models, reports, strict=True):
            model.end_step(None if skipped else report.routing)
        routing = tuple(itertools.chain.from_iterable(report.routing for report in reports))
        balance = {name: value for model in self.models for name, value in model.balance().items()} | self._conflicts
        result = StepResult(losses, norm, counts, routing, skipped, self._progress.scale, balance)
        self._progress = after_step(self._progress, skipped, self.config.train.loss_scale)
        return result


def _idle(objectives: Objectives, step: int) -> set[str]:
    """Tasks without weight at ``step``."""
    return {name for name, its in objectives.items() if its.settings.idle_at(step)}


def _entering(objectives: Objectives, step: int, skipped: int) -> set[str]:
    """Tasks that have a weight at ``step``, and perhaps had none at the last update before it: so many steps were
    ``skipped`` in the whole run, and those between may be among them."""
    earlier = range(max(0, step - 1 - skipped), step)
    return set[str]().union(*(_idle(objectives, each) for each in earlier)) - _idle(objectives, step)


def first_progress(train: TrainConfig) -> Progress:
    """The progress of a new run; without a loss scale if nothing is scaled."""
    settings = train.loss_scale
    scaled = train.precision == "fp16"
    return Progress(0, 0, LossScale(settings.initial, 0, settings.hysteresis) if scaled else None)


def resumed(progress: Progress, train: TrainConfig) -> Progress:
    """The progress of a run that resumes after ``progress``, perhaps in another precision."""
    own = first_progress(train).loss_scale
    if own is None or progress.loss_scale is None:
        return dataclasses.replace(progress, loss_scale=own)
    return progress


def after_step(progress: Progress, skipped: bool, settings: LossScaleConfig) -> Progress:
    """``skipped``: as after an overflow."""
    scale = progress.loss_scale
    return Progress(
        progress.steps + 1,
        progress.updates + (not skipped),
        None if scale is None else next_scale(scale, skipped, settings),
    )


def next_scale(scale: LossScale, overflow: bool, settings: LossScaleConfig) -> LossScale:
    """The scale halves at the overflow that uses up the hysteresis and at each one from then on; ``window`` good
    steps in a row double it and give the hysteresis back."""
    if overflow and scale.hysteresis > 1:
        return LossScale(scale.scale, 0, scale.hysteresis - 1)
    if overflow:
        return LossScale(max(scale.scale / 2, settings.minimum), 0, 1)
    if scale.good_steps + 1 < settings.window:
        return LossScale(scale.scale, scale.good_steps + 1, scale.hysteresis)
    return LossScale(scale.scale * 2, 0, settings.hysteresis)


def loss_sums(reports: Sequence[LossReport], names: Sequence[str], groups: Groups, device: torch.device) -> Tensor:
    """[losses] in fp64: sums over the stages, the microbatches and the data-parallel ranks. Equal on every rank of
    the job, but for the last bit, since groups of ranks may add up in another order.

    ``reports``: of every stage of this rank, with sums over the microbatches (``add_reports``). ``names``: every
    loss of the model.
    """
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    for report in reports:
        for i, name in enumerate(names):
            if name in report.losses:
                sums[i] += report.losses[name]
    for group in (groups.data, groups.pipeline):
        if group_size(group) > 1:
            dist.all_reduce(sums, group=group)
    return sums


def losses_of(sums: Sequence[float], names: Sequence[str], groups: Groups) -> dict[str, float]:
    """The losses of a step by name, means over the data-parallel ranks, and their ``total``."""
    losses = {name: value / groups.data_size for name, value in zip(names, sums, strict=True)}
    return {"total": sum(losses.values()), **losses}


def add_reports(sums: LossReport | None, report: LossReport) -> LossReport:
    """Sums over the microbatches of one stage, made as they come: the co-activation of one layer has [M, E, E]
    numbers. Losses add up in fp64. Routing is over all data-parallel ranks already."""
    losses = {name: loss.double() for name, loss in report.losses.items()}
    if sums is None:
        return LossReport(losses, report.routing)
    routing = tuple(a + b for a, b in zip(sums.routing, report.routing, strict=True))
    return LossReport({name: sums.losses[name] + loss for name, loss in losses.items()}, routing)


def not_finite(numbers: Tensor, groups: Groups) -> Tensor:
    """[1]: 1 where a number of some rank of the job is not finite, else 0; equal on all ranks."""
    bad = (~numbers.isfinite()).any().float().view(1)
    for group in (groups.tensor, groups.data, groups.pipeline):
        if group_size(group) > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=group)
    return bad
