"""The trunk: the blocks that all modalities and tasks share, or those of one pipeline stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmmoe_pretrain.config import ModelConfig, MoEConfig
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.models.attention import StreamPlan
from mmmoe_pretrain.models.block import Block, RMSNorm
from mmmoe_pretrain.models.recompute import run_block
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.parallel.tensor import enter_trunk, leave_trunk


class Trunk(nn.Module):
    """The blocks of ``stage`` under their numbers in the whole trunk, and on the last stage a last
    normalisation. Between the blocks a tensor rank holds all tokens, or under sequence parallelism its
    share of them; the first stage cuts them and the last one puts them together."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, groups: Groups, stage: Stage, names: StreamNames) -> None:
        super().__init__()
        self.groups, self.stage = groups, stage
        self.recompute = False  # keep each block's input alone for the backward pass
        self.blocks = nn.ModuleDict({str(i): Block(model, moe, i, groups, names) for i in stage.blocks})
        self.norm = RMSNorm(model.hidden_size, groups) if stage.last else None

    def forward(self, x_nD: Tensor, plan: StreamPlan) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """[n, D] -> ([n, D], routing sums of each sparse block); n tokens, or this tensor rank's share."""
        if self.stage.first:
            x_nD = enter_trunk(x_nD, self.groups)
        routing = []
        for block in self.blocks.values():
            assert isinstance(block, Block)
            x_nD, stats = run_block(block, x_nD, plan, self.recompute and torch.is_grad_enabled())
            if stats is not None:
                routing.append(stats)
        if self.norm is not None:
            x_nD = leave_trunk(self.norm(x_nD), plan.num_valid, self.groups)
        return x_nD, tuple(routing)
