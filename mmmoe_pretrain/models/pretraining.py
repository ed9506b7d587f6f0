"""The model together with its objectives: from a batch to one loss.

Under pipelining each rank holds one stage of it (or several). Objectives are on the last stage; the auxiliary losses
of a stage's MoE layers get their gradient on that stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.block import is_sparse
from mmmoe_pretrain.models.fusion.modulation import Modulation
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.moe.losses import BalanceWindow, loss_names, reduce_stats, routing_losses
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.objectives import ObjectiveModule, Outputs, StepCounts, step_counts
from mmmoe_pretrain.objectives.uncertainty import WEIGHTING, UncertaintyWeighting
from mmmoe_pretrain.parallel.collectives import summed
from mmmoe_pretrain.parallel.cuts import is_vector
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.stages import Stage, whole

REST = "rest"  # the pass of what belongs to no task: losses of routing, and what weighting adds
Purpose = Literal["teaching", "collecting"]  # of a pass without gradients


@dataclass(frozen=True)
class LossReport:
    """``losses`` by name, each times its weight: a microbatch's part of the step's losses on this rank. Over all
    stages and microbatches they sum to the rank's loss, and the mean over the data-parallel ranks is the loss.
    ``routing`` is over those ranks, of this stage's MoE layers."""

    losses: dict[str, Tensor]
    routing: tuple[RoutingStats, ...]


class PretrainingModel(nn.Module):
    """Objectives over an MMMoE. Weights depend on ``config.seed`` alone, not on the layout."""

    def __init__(self, config: RunConfig, groups: Groups = SINGLE, stage: Stage | None = None) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        self.stage = stage or whole(config.model.num_layers)
        self.window = BalanceWindow()
        self._step = 0
        self._counts: StepCounts | None = None  # None: each forward pass is a step of its own
        self._loss_scale = 1.0
        self._pass: Purpose | Literal["only", "second"] = "only"  # of a step
        self._task: str | None = None  # whose losses this pass has; None: all
        self._measures = True  # this pass
        self.observe: Callable[[Outputs], None] | None = None  # gets the last stage's outputs of each microbatch
        self.mmmoe = MMMoE(config, groups, self.stage)
        self.objectives = self.mmmoe.objectives
        modules: dict[str, nn.Module] = {}
        if self.stage.last:
            size = config.model.embedding_size
            modules = {name: objective.module(size) for name, objective in self.objectives.items()}
        self.tasks = nn.ModuleDict(modules)
        seed, num_layers, stream_name = config.seed, config.model.num_layers, self.mmmoe.stream_name
        init_parameters(self.mmmoe, seed, num_layers, stream_name)
        learned = self.stage.last and config.train.loss_weighting == "uncertainty"
        self.loss_weighting = UncertaintyWeighting(self.objectives.losses) if learned else None
        self._learned_weights: dict[str, Tensor] = {}  # of the last step
        read = self.objectives.representations if self.stage.last else {}
        balanced = {name: Modulation(name, its.settings) for name, its in read.items() if its.settings.modulated}
        self.modulations = nn.ModuleDict(balanced)
        init_parameters(self.tasks, seed, num_layers, lambda name: stream_name(f"tasks.{name}"))

    def forward(self, batch: Batch, received_nD: Tensor | None = None) -> tuple[Tensor, LossReport]:
        """The last stage: this microbatch's part of the step's loss, a scalar (``LossReport``). Another: the
        hidden states for the next one, which carry the gradient of this stage's auxiliary losses. Both:
        the parts of the loss. ``received_nD`` is what the stage before sent, None on the first."""
        x_nD, own_routing = self.mmmoe.run_stage(batch, received_nD)
        if self._pass in ("teaching", "collecting"):
            return self._look(x_nD, batch), LossReport({}, ())
        counts = self._counts or step_counts([batch], self.objectives, self.groups.data, x_nD.device)
        routing = reduce_stats(own_routing, self.groups.data)
        losses: dict[str, Tensor] = {}
        total = x_nD.new_zeros((), dtype=torch.float32)
        if self.stage.last:
            outputs = self.mmmoe.heads(x_nD, batch, self._gradient_factors(batch))
            losses, total = self._objectives(outputs, batch, counts)
            if self._measures:
                self._measure_parts(outputs, batch)
            if self.loss_weighting is not None and self.training and self._has(REST):
                share = self.groups.data_size * batch.num_valid / max(1, counts.tokens)
                losses[WEIGHTING] = self.loss_weighting.penalty(self._weighted_losses(counts), share)
                total = total + losses[WEIGHTING]
            if self.observe is not None:
                self.observe(outputs)
        auxiliary = self._auxiliary(routing, counts.tokens) if self._has(REST) else {}
        losses |= auxiliary
        if auxiliary:
            total = total + torch.stack(list(auxiliary.values())).sum()
        report = LossReport({k: v.detach() for k, v in losses.items()}, tuple(s.detach() for s in routing))
        if self.stage.last:
            return total, report
        return (_WithLoss.apply(x_nD, total, self._loss_scale) if auxiliary else x_nD), report

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Every loss of the whole model in a fixed order, on every stage."""
        names = list(self.objectives.losses)
        if self.config.train.loss_weighting == "uncertainty":
            names.append(WEIGHTING)
        if self._num_moe_layers:
            names += [f"aux/{name}" for name in loss_names(self.config.moe.losses, self.mmmoe.names.modalities)]
        return tuple(names)

    @property
    def _num_moe_layers(self) -> int:
        return sum(is_sparse(self.config.moe, i) for i in range(self.config.model.num_layers))

    def _objectives(self, outputs: Outputs, batch: Batch, counts: StepCounts) -> tuple[dict[str, Tensor], Tensor]:
        """The weighted losses by name, and what stands for them in the total: themselves, or of an objective over the
        whole step, whose losses are values alone, its surrogate, which is 0 and has their gradient."""
        losses: dict[str, Tensor] = {}
        total = outputs.hidden_nD.new_zeros((), dtype=torch.float32)
        factors = self._factors(counts)
        for name, module in self._task_modules():
            if not self._has(name):
                continue
            own = {loss: factors[loss] * value for loss, value in module(outputs, batch, self.groups).items()}
            losses |= own
            if self._pass == "second" and self.objectives[name].whole_step:
                total = total + module.surrogate(outputs)
            total = total + torch.stack(list(own.values())).sum()
        if self._task is not None:  # engines may wait for every gradient
            total = _Reaching.apply(total, *_differentiable(outputs), *self.loss_parameters())
        return losses, total

    def _has(self, task: str) -> bool:
        """This pass has the losses of ``task``."""
        return self._task in (None, task)

    def passes(self, step: int) -> tuple[str, ...]:
        """Of a step that takes the gradient of each task alone: one for every task with a weight, and ``REST``, if
        there is anything in it. Fewer than two tasks need none."""
        tasks = tuple(name for name, its in self.objectives.items() if not its.settings.idle_at(step))
        more = (REST,) if len(self.loss_names) > len(self.objectives.losses) else ()
        return (*tasks, *more) if len(tasks) > 1 else ()

    def begin_pass(self, task: str | None, first: bool = True) -> None:
        """The next pass with gradients has the losses of ``task`` alone, or of all (None). ``first``: of its step."""
        self._task, self._measures = task, first

    def _gradient_factors(self, batch: Batch) -> dict[str, Tensor]:
        """Of the parts of the representations that are balanced, in training."""
        if not self.training:
            return {}
        return {name: its.factors(batch, self.config.seed, self._step) for name, its in self._modulations()}

    def _measure_parts(self, outputs: Outputs, batch: Batch) -> None:
        """How far each part of them is, for the next step."""
        if not outputs.terms:
            return
        sums = [module.progress(outputs, batch, self.groups) for _, module in self._task_modules()]
        for name, modulation in self._modulations():
            own = torch.stack([found[name] for found in sums if name in found]).sum(dim=0)
            modulation.add(summed(own, self.groups.data) if self.groups.data_size > 1 else own)

    def balance(self) -> dict[str, Tensor]:
        """How far the objectives and modalities are, by name, each a number, where something balances them:
        ``weight/LOSS`` that was learned (of the last step), and ``Modulation.figures`` (after it)."""
        found = {f"weight/{loss}": weight.view(1) for loss, weight in self._learned_weights.items()}
        for _, modulation in self._modulations():
            found |= modulation.figures()
        return found

    def _modulations(self) -> Iterator[tuple[str, Modulation]]:
        for name, module in self.modulations.items():
            assert isinstance(module, Modulation)
            yield name, module

    def _factors(self, counts: StepCounts) -> dict[str, float | Tensor]:
        """The factors, by loss, from a rank's sum to its part of the weighted mean."""
        weights, factors = self.objectives.weights(self._step), dict[str, float | Tensor]()
        for loss, weight in weights.items():
            factors[loss] = weight * self.groups.data_size / max(1, counts.terms[loss])
            if self.loss_weighting is not None and self.training:
                learned = self.loss_weighting.factor(loss)
                factors[loss] = factors[loss] * learned
                self._learned_weights[loss] = learned.detach()
        return factors

    def _weighted_losses(self, counts: StepCounts) -> list[str]:
        """Those that have a weight and terms in this step: without a loss the penalty alone would move its weight."""
        weights = self.objectives.weights(self._step)
        return [loss for loss, weight in weights.items() if weight and counts.terms[loss]]

    def loss_parameters(self) -> Iterator[nn.Parameter]:
        """Those that objectives and their weighting use outside of any module's call."""
        yield from self.tasks.parameters()
        if self.loss_weighting is not None:
            yield from self.loss_weighting.parameters()

    def _auxiliary(self, routing: tuple[RoutingStats, ...], tokens: int) -> dict[str, Tensor]:
        """This stage's part of the mean over all MoE layers, for a global microbatch of a step of ``tokens``."""
        if not routing:
            return {}
        counts = self.window.add(routing) if self.training else None
        share = len(routing) / self._num_moe_layers * routing[0].tokens_M.sum() / max(1, tokens)
        losses = routing_losses(routing, self.config.moe.losses, counts)
        return {f"aux/{name}": share * loss for name, loss in losses.items()}

    def begin_step(self, step: int, counts: StepCounts | None = None, loss_scale: float = 1.0) -> None:
        """Before the microbatches of optimizer step ``step`` (from 0), which together have ``counts``: what is
        random in routing becomes a function of the run's seed, the step and the data-parallel rank, so that a
        resumed run repeats it. The engine multiplies the loss by ``loss_scale`` (fp16), and so it is with
        auxiliary losses that get their gradient on an earlier stage."""
        seed = (self.config.seed * 1_000_003 + step) * 65_537 + self.groups.data_rank
        self._step, self._counts, self._loss_scale = step, counts, loss_scale
        self.window.reset()
        self.mmmoe.begin_step(seed)
        for _, module in self._task_modules():
            module.begin_step(step)

    def begin_look(self, purpose: Purpose) -> None:
        """Before a pass without gradients over all microbatches of a step: with the average of the weights, where
        some objective has a teacher (``Objectives.taught``), or where one's loss is of the whole step
        (``Objectives.whole_step``)."""
        self._pass = purpose

    def end_look(self) -> None:
        """After that pass; of the collecting one: the losses of the whole step, for ``forward`` to use.
        ``begin_step`` has to be called again after it."""
        if self._pass == "teaching":
            self._pass = "only"
            return
        assert self._pass == "collecting" and self._counts is not None
        self._pass = "second"
        with torch.no_grad():
            factors = self._factors(self._counts)
        for module in self._over_whole_step():
            module.finish(self.groups, factors)

    def _look(self, x_nD: Tensor, batch: Batch) -> Tensor:
        if not self.stage.last:
            return x_nD
        outputs = self.mmmoe.heads(x_nD, batch)
        if self._pass == "collecting":
            for module in self._over_whole_step():
                module.collect(outputs, batch)
        else:
            for name, module in self._task_modules():
                if self.objectives[name].settings.taught:
                    module.teach(outputs, batch, self.groups)
        return x_nD.new_zeros(())

    def _task_modules(self) -> Iterator[tuple[str, ObjectiveModule]]:
        for name, module in self.tasks.items():
            assert isinstance(module, ObjectiveModule)
            yield name, module

    def _over_whole_step(self) -> list[ObjectiveModule]:
        return [module for name, module in self._task_modules() if self.objectives[name].whole_step]

    def upper_bounds(self) -> list[tuple[nn.Parameter, float]]:
        """Parameters that objectives keep below a bound."""
        return [bound for _, module in self._task_modules() for bound in module.upper_bounds()]

    def end_step(self, routing: tuple[RoutingStats, ...] | None) -> None:
        """After the optimizer step: routers follow the load. ``routing``, of this stage's MoE layers, is over
        all data-parallel ranks and microbatches; None if the step was skipped."""
        self._counts, self._pass = None, "only"
        for _, module in self._task_modules():
            module.after_step(committed=routing is not None)
        for _, modulation in self._modulations():
            modulation.after_step(committed=routing is not None)
        if routing is not None:
            for router, stats in zip(self.mmmoe.routers, routing, strict=True):
                router.end_step(stats)

    def use_half(self, dtype: torch.dtype) -> None:
        """Compute the trunk in bfloat16 or float16; vectors, routers, embedders and heads stay fp32."""
        self.mmmoe.compute_dtype = dtype
        for name, parameter in self.mmmoe.trunk.named_parameters():
            if not is_vector(parameter) and ".router." not in name:
                parameter.data = parameter.data.to(dtype)
        for head in self.mmmoe.token_heads:
            for parameter in head.parameters():
                parameter.data = parameter.data.to(dtype)


def _differentiable(outputs: Outputs) -> Iterator[Tensor]:
    every = (outputs.features, outputs.token_nll, outputs.contents, outputs.projected, outputs.class_logits)
    for tensor in (outputs.hidden_nD, *(tensor for by_name in every for tensor in by_name.values())):
        if tensor.requires_grad:
            yield tensor


class _Reaching(torch.autograd.Function):
    """``total``, whose backward pass also reaches ``others``, with gradients of zeros."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *others: Tensor) -> Tensor:
        ctx.shapes = [(other.shape, other.dtype, other.device) for other in others]
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes)


class _WithLoss(torch.autograd.Function):
    """x, whose backward pass also gives ``loss`` the gradient ``scale``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None
