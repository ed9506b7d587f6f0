"""The trunk: the blocks that all modalities and tasks share."""

from __future__ import annotations

from torch import Tensor, nn

from mmmoe_pretrain.config import ModelConfig, MoEConfig
from mmmoe_pretrain.models.attention import StreamPlan
from mmmoe_pretrain.models.block import Block, RMSNorm
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.groups import Groups


class Trunk(nn.Module):
    """``num_layers`` blocks and a last normalisation."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, groups: Groups) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(model, moe, i, groups) for i in range(model.num_layers))
        self.norm = RMSNorm(model.hidden_size)

    def forward(self, x_nD: Tensor, plan: StreamPlan) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """[n, D] -> ([n, D], routing sums of each sparse block)."""
        routing = []
        for block in self.blocks:
            x_nD, stats = block(x_nD, plan)
            if stats is not None:
                routing.append(stats)
        return self.norm(x_nD), tuple(routing)
