"""The model together with what it is trained to do: a batch goes in, one loss comes out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.moe.losses import BalanceWindow, reduce_stats, routing_losses
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.objectives.captioning import captioning_loss
from mmmoe_pretrain.objectives.contrastive import ContrastiveObjective
from mmmoe_pretrain.parallel.groups import SINGLE, Groups


@dataclass(frozen=True)
class LossReport:
    """``losses`` by name, each times its weight; they sum to the loss. On a rank they are its
    share: the mean over the data-parallel ranks is the value. ``routing`` is over all ranks."""

    losses: dict[str, Tensor]
    routing: tuple[RoutingStats, ...]


class PretrainingModel(nn.Module):
    """Objectives over an MMMoE. Weights depend on ``config.seed`` alone, not on the layout."""

    def __init__(self, config: RunConfig, vocab_size: int, groups: Groups = SINGLE) -> None:
        super().__init__()
        self.config = config
        self.groups = groups
        self.window = BalanceWindow()
        self.mmmoe = MMMoE(config, vocab_size, groups)
        init_parameters(self.mmmoe, config.seed, config.model.num_layers)
        self.contrastive: ContrastiveObjective | None = None
        if config.objectives.contrastive.weight > 0:
            self.contrastive = ContrastiveObjective(config.objectives.contrastive)

    def forward(self, batch: Batch) -> tuple[Tensor, LossReport]:
        """The loss (a scalar; its mean over the ranks counts) and its parts."""
        output = self.mmmoe(batch)
        losses: dict[str, Tensor] = {}
        objectives = self.config.objectives
        if self.contrastive is not None:
            pairs = self.contrastive(output.features, batch.present_MB, batch.group_ids, self.groups)
            for pair, loss in pairs.items():
                losses[f"contrastive/{pair}"] = (
                    objectives.contrastive.weight * objectives.contrastive.pairs[pair] * loss.squeeze()
                )
        if objectives.captioning.weight > 0:
            losses["captioning"] = objectives.captioning.weight * captioning_loss(output.caption_nll, self.groups)
        routing = reduce_stats(output.routing, self.groups.data)
        counts = self.window.add(routing) if self.training else None
        for name, loss in routing_losses(routing, self.config.moe.losses, counts).items():
            losses[f"aux/{name}"] = loss
        detached = {name: loss.detach() for name, loss in losses.items()}
        return torch.stack(list(losses.values())).sum(), LossReport(
            detached, tuple(stats.detach() for stats in routing)
        )

    def begin_step(self, step: int) -> None:
        """Before the microbatches of optimizer step ``step`` (from 0): what is random in routing becomes
        a function of the run's seed, the step and the data-parallel rank, so that a resumed run repeats it."""
        seed = (self.config.seed * 1_000_003 + step) * 65_537 + self.groups.data_rank
        self.window.reset()
        self.mmmoe.begin_step(seed)

    def end_step(self, routing: tuple[RoutingStats, ...]) -> None:
        """After the optimizer step: routers follow the load. ``routing`` is over all ranks and microbatches."""
        for router, stats in zip(self._routers(), routing, strict=True):
            router.end_step(stats)

    def _routers(self) -> list[Router]:
        return [module for module in self.modules() if isinstance(module, Router)]

    def use_bf16(self) -> None:
        """Compute the trunk in bfloat16; vectors, routers, embedders and heads stay fp32."""
        self.mmmoe.compute_dtype = torch.bfloat16
        for name, parameter in self.mmmoe.trunk.named_parameters():
            if parameter.ndim >= 2 and ".router." not in name:
                parameter.data = parameter.data.bfloat16()
        if self.mmmoe.language_head is not None:
            self.mmmoe.language_head.bfloat16()
