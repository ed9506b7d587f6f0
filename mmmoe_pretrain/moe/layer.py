"""The mixture-of-experts layer: router, dispatcher and experts composed.

Every tensor rank routes all n tokens in the same way and holds a part of every expert; the partial sums are reduced
once, after the dispatcher. t: rows of this rank, n or under sequence parallelism a share.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from mmmoe_pretrain.config.base import ONE_STREAM, StreamNames
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.moe.dispatch import make_dispatcher
from mmmoe_pretrain.moe.experts import SharedExpert, make_experts, slot_of_expert
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.tensor import enter_parts, leave_parts, sum_gradients


class MoELayer(nn.Module):
    """A sparse feed-forward layer over the valid tokens of a stream."""

    def __init__(
        self, config: MoEConfig, hidden_size: int, layer: int, groups: Groups, names: StreamNames = ONE_STREAM
    ) -> None:
        super().__init__()
        config = config.for_layer(layer)
        self.config, self.groups = config, groups
        self.router = Router(config, hidden_size, layer, names)
        self.experts = make_experts(config, hidden_size, groups)
        self.shared = SharedExpert(config, hidden_size, groups) if config.shared_expert_hidden_size else None
        self.dispatcher = make_dispatcher(config, groups)
        self.register_buffer("slot_E", slot_of_expert(config, groups.expert_size), persistent=False)

    def forward(self, x_tD: Tensor, tokens: TokenInfo) -> tuple[Tensor, RoutingStats]:
        """[t, D] of the valid ``tokens`` -> ([t, D], sums of this rank's routing)."""
        alike_nD, x_nD = enter_parts(x_tD, tokens.num_tokens, self.groups)
        routing = self.router(alike_nD, tokens)
        weights_nK = sum_gradients(routing.weights_nK, self.groups)
        num_slots = self.config.num_experts
        slots_nK = self.get_buffer("slot_E")[routing.expert_ids_nK].masked_fill(~routing.kept_nK, num_slots)
        shared = self.shared
        out_nD, shared_nD, lending = self.dispatcher.run(
            x_nD, slots_nK, weights_nK, self.experts, None if shared is None else lambda: shared(x_nD, alike_nD)
        )
        if shared_nD is not None:
            out_nD = out_nD + shared_nD
        if self.config.identity_experts and self.groups.tensor_rank == 0:  # not a partial sum: added on one rank only
            identity_n = self._identity_weight(routing.expert_ids_nK, weights_nK)
            out_nD = out_nD + identity_n[:, None].to(x_nD.dtype) * x_nD
        return leave_parts(out_nD, self.groups), replace(routing.stats, lending=lending)

    def _identity_weight(self, ids_nK: Tensor, weights_nK: Tensor) -> Tensor:
        """[n]: the sum of the weights of each token's identity experts."""
        first = self.config.num_experts
        is_identity = (ids_nK >= first) & (ids_nK < first + self.config.identity_experts)
        return torch.where(is_identity, weights_nK, 0.0).sum(-1)
