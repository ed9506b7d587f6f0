"""The mixture-of-experts layer: router, dispatcher and experts composed."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.config import MoEConfig
from mmmoe_pretrain.moe.dispatch import make_dispatcher
from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.moe.routing import ROUTERS, RoutingStats
from mmmoe_pretrain.parallel.groups import Groups


class MoELayer(nn.Module):
    """A sparse feed-forward layer over the valid tokens of a stream.

    ``router``: [E, D], read in fp32 whatever the compute type.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, layer: int, groups: Groups) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.router = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.route = ROUTERS[config.router]
        self.experts = Experts(groups.local_experts(config.num_experts), hidden_size, config.expert_hidden_size)
        self.dispatcher = make_dispatcher(config.num_experts, groups)

    def forward(self, x_nD: Tensor, modality_ids_n: Tensor) -> tuple[Tensor, RoutingStats]:
        """[n, D] valid tokens -> ([n, D], sums of this rank's routing)."""
        logits_nE = F.linear(x_nD.float(), self.router.float())
        routing = self.route(logits_nE, modality_ids_n, self.config)
        dispatched = self.dispatcher.dispatch(x_nD, routing)
        y_nD = self.experts(dispatched.x_nD, dispatched.counts)
        out_nD = self.dispatcher.combine(y_nD, dispatched)
        return out_nD, dataclasses.replace(routing.stats, layer=self.layer)
