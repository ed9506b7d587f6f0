"""The model together with what it is trained to do: a batch goes in, one loss comes out.

Under pipelining each rank holds one stage of it (or several). Objectives live on the last stage; the
auxiliary losses of a stage's own mixtures get their gradient where they arise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.block import is_sparse
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.models.mmmoe import MMMoE, ModelOutput
from mmmoe_pretrain.moe.losses import BalanceWindow, loss_names, reduce_stats, routing_losses
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.objectives.cached import ContrastiveCache
from mmmoe_pretrain.objectives.contrastive import ContrastiveObjective
from mmmoe_pretrain.objectives.counts import CAPTIONING, CONTRASTIVE, StepCounts, loss_weights, step_counts
from mmmoe_pretrain.parallel.cuts import is_vector
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.stages import Stage, whole


@dataclass(frozen=True)
class LossReport:
    """``losses`` by name, each times its weight: a microbatch's part of the step's losses on this rank. Over all
    stages and microbatches they sum to the rank's loss, and the mean over the data-parallel ranks is the loss.
    ``routing`` is over those ranks, of this stage's mixtures."""

    losses: dict[str, Tensor]
    routing: tuple[RoutingStats, ...]


class PretrainingModel(nn.Module):
    """Objectives over an MMMoE. Weights depend on ``config.seed`` alone, not on the layout."""

    def __init__(
        self, config: RunConfig, vocab_size: int, groups: Groups = SINGLE, stage: Stage | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        self.stage = stage or whole(config.model.num_layers)
        self.window = BalanceWindow()
        self._counts: StepCounts | None = None  # None: each forward pass is a step of its own
        self._loss_scale = 1.0
        self._cache: _Cache | None = None
        self.mmmoe = MMMoE(config, vocab_size, groups, self.stage)
        init_parameters(self.mmmoe, config.seed, config.model.num_layers)
        self.contrastive: ContrastiveObjective | None = None
        if config.objectives.contrastive.on and self.stage.last:
            self.contrastive = ContrastiveObjective(config.objectives.contrastive)

    def forward(self, batch: Batch, received_nD: Tensor | None = None) -> tuple[Tensor, LossReport]:
        """The last stage: this microbatch's part of the step's loss, a scalar (``LossReport``). Another: the
        hidden states for the next one, which carry the gradient of this stage's auxiliary losses. Both:
        the parts of the loss. ``received_nD`` is what the stage before sent, None on the first."""
        x_nD, own_routing = self.mmmoe.run_stage(batch, received_nD)
        if self._cache is not None and self._cache.sums is None:
            return self._collect(x_nD, batch), LossReport({}, ())
        counts = self._counts or step_counts([batch], self.config.objectives, self.groups.data, x_nD.device)
        routing = reduce_stats(own_routing, self.groups.data)
        losses: dict[str, Tensor] = {}
        surrogate = None
        if self.stage.last:
            output = self.mmmoe.heads(x_nD, batch, own_routing)
            losses |= self._objectives(output, batch, counts)
            surrogate = self._cache.next_surrogate(output.features) if self._cache is not None else None
        auxiliary = self._auxiliary(routing, counts.tokens)
        losses |= auxiliary
        report = LossReport({k: v.detach() for k, v in losses.items()}, tuple(s.detach() for s in routing))
        if self.stage.last:
            if self.contrastive is None:  # no loss reaches the joint heads, and engines wait for every gradient
                surrogate = 0.0 * torch.stack([rows.sum() for rows in output.features.values()]).sum()
            return self._total(losses, surrogate), report
        if auxiliary:
            total = torch.stack(list(auxiliary.values())).sum()
            x_nD = _WithLoss.apply(x_nD, total, self._loss_scale)
        return x_nD, report

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Every loss of the whole model in a fixed order, whatever this stage holds."""
        names = list(loss_weights(self.config.objectives))
        if self._num_mixtures:
            names += [f"aux/{name}" for name in loss_names(self.config.moe.losses)]
        return tuple(names)

    @property
    def _num_mixtures(self) -> int:
        return sum(is_sparse(self.config.moe, i) for i in range(self.config.model.num_layers))

    def _objectives(self, output: ModelOutput, batch: Batch, counts: StepCounts) -> dict[str, Tensor]:
        sums = {CAPTIONING: output.caption_nll.sum()}
        if self.contrastive is not None:
            if self._cache is not None:
                pairs = self._cache.known_sums
            else:
                pairs = self.contrastive(output.features, batch.present_MB, batch.group_ids, self.groups)
            sums |= {CONTRASTIVE + pair: value for pair, value in pairs.items()}
        return {name: factor * sums[name] for name, factor in self._factors(counts).items()}

    def _factors(self, counts: StepCounts) -> dict[str, float]:
        """By the name of an objective's loss: what makes of a rank's sum its part of the weighted mean."""
        weights = loss_weights(self.config.objectives)
        return {name: w * self.groups.data_size / max(1, counts.terms[name]) for name, w in weights.items()}

    def _auxiliary(self, routing: tuple[RoutingStats, ...], tokens: int) -> dict[str, Tensor]:
        """This stage's part of the mean over all mixtures, for a global microbatch of a step of ``tokens``."""
        if not routing:
            return {}
        counts = self.window.add(routing) if self.training else None
        share = len(routing) / self._num_mixtures * routing[0].tokens_M.sum() / max(1, tokens)
        losses = routing_losses(routing, self.config.moe.losses, counts)
        return {f"aux/{name}": share * loss for name, loss in losses.items()}

    def begin_step(self, step: int, counts: StepCounts | None = None, loss_scale: float = 1.0) -> None:
        """Before the microbatches of optimizer step ``step`` (from 0), which together have ``counts``: what is
        random in routing becomes a function of the run's seed, the step and the data-parallel rank, so that a
        resumed run repeats it. The engine multiplies the loss by ``loss_scale`` (fp16), and so it is with
        auxiliary losses that get their gradient on an earlier stage."""
        seed = (self.config.seed * 1_000_003 + step) * 65_537 + self.groups.data_rank
        self._counts, self._loss_scale = counts, loss_scale
        self.window.reset()
        self.mmmoe.begin_step(seed)

    def begin_caching(self) -> None:
        """Before a pass without gradients over all microbatches of a step, where
        ``objectives.contrastive.cached``: it collects what the contrastive loss is of."""
        self._cache = _Cache()

    def end_caching(self) -> None:
        """After that pass: the contrastive loss of the whole step, for ``forward`` to go by. ``begin_step``
        has to be called again after it."""
        assert self._cache is not None and self._counts is not None
        factors = {name.removeprefix(CONTRASTIVE): f for name, f in self._factors(self._counts).items()}
        self._cache.finish(self.contrastive, self.groups, factors)

    def _collect(self, x_nD: Tensor, batch: Batch) -> Tensor:
        assert self._cache is not None
        if not self.stage.last:
            return x_nD
        self._cache.cache.collect(self.mmmoe.features(x_nD, batch), batch.present_MB, batch.group_ids)
        return x_nD.new_zeros(())

    def _total(self, losses: dict[str, Tensor], surrogate: Tensor | None) -> Tensor:
        """The loss. Losses out of a cache are values alone; the surrogate, of value 0, has their gradient."""
        total = torch.stack(list(losses.values())).sum()
        return total if surrogate is None else total + surrogate

    def end_step(self, routing: tuple[RoutingStats, ...] | None) -> None:
        """After the optimizer step: routers follow the load. ``routing``, of this stage's mixtures, is over
        all data-parallel ranks and microbatches; None where the step was left out."""
        self._cache = self._counts = None
        if routing is not None:
            for router, stats in zip(self._routers(), routing, strict=True):
                router.end_step(stats)

    def _routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def use_half(self, dtype: torch.dtype) -> None:
        """Compute the trunk in bfloat16 or float16; vectors, routers, embedders and heads stay fp32."""
        self.mmmoe.compute_dtype = dtype
        for name, parameter in self.mmmoe.trunk.named_parameters():
            if not is_vector(parameter) and ".router." not in name:
                parameter.data = parameter.data.to(dtype)
        if self.mmmoe.language_head is not None:
            for parameter in self.mmmoe.language_head.parameters():
                parameter.data = parameter.data.to(dtype)


class _Cache:
    """The contrastive part of a step that is run twice; on the last stage, else a mark of the first pass."""

    def __init__(self) -> None:
        self.cache = ContrastiveCache()
        self.sums: dict[str, Tensor] | None = None  # of each pair, a microbatch's share; None in the first pass
        self._next = 0

    @property
    def known_sums(self) -> dict[str, Tensor]:
        assert self.sums is not None
        return self.sums

    def finish(self, objective: ContrastiveObjective | None, groups: Groups, factors: dict[str, float]) -> None:
        self.sums = {} if objective is None else self.cache.finish(objective, groups, factors)

    def next_surrogate(self, features: dict[str, Tensor]) -> Tensor:
        self._next += 1
        return self.cache.surrogate(self._next - 1, features)


class _WithLoss(torch.autograd.Function):
    """x, whose backward pass also gives ``loss`` the gradient ``scale``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.scale), None
