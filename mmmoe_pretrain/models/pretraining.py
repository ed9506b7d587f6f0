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
from mmmoe_pretrain.objectives.captioning import captioning_loss
from mmmoe_pretrain.objectives.contrastive import ContrastiveObjective
from mmmoe_pretrain.parallel.cuts import is_vector
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.stages import Stage, whole


@dataclass(frozen=True)
class LossReport:
    """``losses`` by name, each times its weight; over all stages they sum to the loss. On a rank they
    are its share: the mean over the data-parallel ranks is the value. ``routing`` is over those ranks,
    of this stage's mixtures."""

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
        self._share = 1.0  # of an auxiliary loss in the gradient
        self._cache: _Cache | None = None
        self.mmmoe = MMMoE(config, vocab_size, groups, self.stage)
        init_parameters(self.mmmoe, config.seed, config.model.num_layers)
        self.contrastive: ContrastiveObjective | None = None
        if config.objectives.contrastive.weight > 0 and self.stage.last:
            self.contrastive = ContrastiveObjective(config.objectives.contrastive)

    def forward(self, batch: Batch, received_nD: Tensor | None = None) -> tuple[Tensor, LossReport]:
        """The last stage: the loss (a scalar; its mean over the data-parallel ranks counts). Another: the
        hidden states for the next one, which carry the gradient of this stage's auxiliary losses. Both:
        the parts of the loss. ``received_nD`` is what the stage before sent, None on the first."""
        x_nD, own_routing = self.mmmoe.run_stage(batch, received_nD)
        if self._cache is not None and self._cache.losses is None:
            return self._collect(x_nD, batch), LossReport({}, ())
        routing = reduce_stats(own_routing, self.groups.data)
        losses: dict[str, Tensor] = {}
        surrogate = None
        if self.stage.last:
            output = self.mmmoe.heads(x_nD, batch, own_routing)
            losses |= self._objectives(output, batch)
            surrogate = self._cache.next_surrogate(output.features) if self._cache is not None else None
        auxiliary = self._auxiliary(routing)
        losses |= auxiliary
        report = LossReport({k: v.detach() for k, v in losses.items()}, tuple(s.detach() for s in routing))
        if self.stage.last:
            if self.contrastive is None:  # no loss reaches the joint heads, and engines wait for every gradient
                surrogate = 0.0 * torch.stack([rows.sum() for rows in output.features.values()]).sum()
            return self._total(losses, surrogate), report
        if auxiliary:
            total = torch.stack(list(auxiliary.values())).sum()
            x_nD = _WithLoss.apply(x_nD, total, self._share)
        return x_nD, report

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Every loss of the whole model in a fixed order, whatever this stage holds."""
        objectives = self.config.objectives
        names = []
        if objectives.contrastive.weight > 0:
            names += [f"contrastive/{pair}" for pair in sorted(objectives.contrastive.pairs)]
        if objectives.captioning.weight > 0:
            names.append("captioning")
        if self._num_mixtures:
            names += [f"aux/{name}" for name in loss_names(self.config.moe.losses)]
        return tuple(names)

    @property
    def _num_mixtures(self) -> int:
        return sum(is_sparse(self.config.moe, i) for i in range(self.config.model.num_layers))

    def _objectives(self, output: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        objectives = self.config.objectives
        if self.contrastive is not None:
            if self._cache is not None:
                pairs = self._cache.known_losses
            else:
                pairs = self.contrastive(output.features, batch.present_MB, batch.group_ids, self.groups)
            for pair, weight in sorted(objectives.contrastive.pairs.items()):
                losses[f"contrastive/{pair}"] = objectives.contrastive.weight * weight * pairs[pair].squeeze()
        if objectives.captioning.weight > 0:
            losses["captioning"] = objectives.captioning.weight * captioning_loss(output.caption_nll, self.groups)
        return losses

    def _auxiliary(self, routing: tuple[RoutingStats, ...]) -> dict[str, Tensor]:
        """This stage's part of the mean over all mixtures."""
        counts = self.window.add(routing) if self.training else None
        share = len(routing) / max(1, self._num_mixtures)
        losses = routing_losses(routing, self.config.moe.losses, counts)
        return {f"aux/{name}": share * loss for name, loss in losses.items()}

    def begin_step(self, step: int, num_microbatches: int = 1, loss_scale: float = 1.0) -> None:
        """Before the microbatches of optimizer step ``step`` (from 0): what is random in routing becomes
        a function of the run's seed, the step and the data-parallel rank, so that a resumed run repeats it.
        The engine divides the loss of each microbatch by their number and multiplies it by ``loss_scale`` (fp16);
        so it is with auxiliary losses."""
        seed = (self.config.seed * 1_000_003 + step) * 65_537 + self.groups.data_rank
        self._share = loss_scale / num_microbatches
        self.window.reset()
        self.mmmoe.begin_step(seed)

    def begin_caching(self) -> None:
        """Before a pass without gradients over all microbatches of a step, where
        ``objectives.contrastive.cached``: it collects what the contrastive loss is of."""
        self._cache = _Cache()

    def end_caching(self) -> None:
        """After that pass: the contrastive loss of the whole step, for ``forward`` to go by. ``begin_step``
        has to be called again after it."""
        assert self._cache is not None
        self._cache.finish(self.contrastive, self.groups)

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
        self._cache = None
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
        self.losses: dict[str, Tensor] | None = None  # of each pair; None in the first pass
        self._next = 0

    @property
    def known_losses(self) -> dict[str, Tensor]:
        assert self.losses is not None
        return self.losses

    def finish(self, objective: ContrastiveObjective | None, groups: Groups) -> None:
        self.losses = {} if objective is None else self.cache.finish(objective, groups)

    def next_surrogate(self, features: dict[str, Tensor]) -> Tensor:
        self._next += 1
        return self.cache.surrogate(self._next - 1, features)


class _WithLoss(torch.autograd.Function):
    """x, whose backward pass also gives ``loss`` the gradient ``share``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, share: float) -> Tensor:
        ctx.share, ctx.like = share, loss.detach()
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, torch.full_like(ctx.like, ctx.share), None
