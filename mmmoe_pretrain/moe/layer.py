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
from mmmoe_pretrain.moe.dispatch import Dispatched, make_dispatcher
from mmmoe_pretrain.moe.expert_attention import ExpertAttention
from mmmoe_pretrain.moe.experts import SharedExpert, make_experts, slot_of_expert
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.routing import Routing
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.collectives import all_reduce_sum
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.tensor import enter_parts, enter_trunk, leave_parts, leave_trunk, sum_gradients


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
        size = config.expert_attention_size
        self.expert_attention = ExpertAttention(hidden_size, size) if size else None
        self.dispatcher = make_dispatcher(config, groups)
        self.register_buffer("slot_E", slot_of_expert(config, groups.expert_size), persistent=False)

    def forward(
        self, x_tD: Tensor, tokens: TokenInfo, memory_tR: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """[t, D] of the valid ``tokens`` -> ([t, D], sums of this rank's routing). With a routing memory, that of the
        layer before comes in as ``memory_tR``, and the new one stands behind the D columns of the result."""
        alike_nD, x_nD = enter_parts(x_tD, tokens.num_tokens, self.groups)
        memory_nR = None if memory_tR is None else leave_trunk(memory_tR, tokens.num_tokens, self.groups)
        routing = self.router(alike_nD, tokens, memory_nR)
        combine = self._sum if self.expert_attention is None else self._sum_after_attention
        out_tD, lending = combine(x_nD, alike_nD, routing)
        if routing.memory_nR is not None:
            new_tR = enter_trunk(routing.memory_nR.to(out_tD.dtype), self.groups)
            out_tD = torch.cat([out_tD, new_tR], dim=1)
        return out_tD, replace(routing.stats, lending=lending)

    def _sum(self, x_nD: Tensor, alike_nD: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """The weighted sum of each token's experts, and what lending did. The dispatcher makes the sums."""
        weights_nK = sum_gradients(routing.weights_nK, self.groups)
        out_nD, shared_nD, lending = self._dispatched(x_nD, alike_nD, self._slots(routing), weights_nK)
        if shared_nD is not None:
            out_nD = out_nD + shared_nD
        if self.config.identity_experts and self.groups.tensor_rank == 0:  # not a partial sum: added on one rank only
            identity_n = torch.where(self._is_identity(routing), weights_nK, 0.0).sum(-1)
            out_nD = out_nD + identity_n[:, None].to(x_nD.dtype) * x_nD
        return leave_parts(out_nD, self.groups), lending

    def _sum_after_attention(self, x_nD: Tensor, alike_nD: Tensor, routing: Routing) -> tuple[Tensor, Tensor | None]:
        """The same of what each expert makes of a token once it has seen the others. A row is sent for every choice,
        as a token of one expert and weight 1, so that its output comes back by itself. Tensor ranks hold parts of
        each output, whose sum all of them compute attention on alike."""
        assert self.expert_attention is not None
        (n, k), slots_nK, identity_nK = routing.kept_nK.shape, self._slots(routing), self._is_identity(routing)
        x_AD = x_nD[:, None].expand(-1, k, -1).flatten(0, 1)
        ones_A1 = torch.ones_like(routing.weights_nK).view(-1, 1)
        y_AD, shared_nD, lending = self._dispatched(x_AD, alike_nD, slots_nK.view(-1, 1), ones_A1, x_nD)
        y_nKD = all_reduce_sum(y_AD, self.groups.tensor, backward=False).view(n, k, x_nD.shape[1])
        if self.config.identity_experts:
            y_nKD = torch.where(identity_nK[..., None], alike_nD[:, None], y_nKD)
        y_nKD = y_nKD + self.expert_attention(
            y_nKD, (slots_nK < self.config.num_experts) | (identity_nK & routing.kept_nK)
        )
        out_tD = enter_trunk((routing.weights_nK[..., None].to(y_nKD.dtype) * y_nKD).sum(1), self.groups)
        return out_tD if shared_nD is None else out_tD + leave_parts(shared_nD, self.groups), lending

    def _dispatched(
        self, x_AD: Tensor, alike_nD: Tensor, slots_AK: Tensor, weights_AK: Tensor, x_nD: Tensor | None = None
    ) -> Dispatched:
        """``x_nD``: what the shared expert reads, where it is not ``x_AD``."""
        shared, tokens_nD = self.shared, x_AD if x_nD is None else x_nD
        overlap = None if shared is None else lambda: shared(tokens_nD, alike_nD)
        return self.dispatcher.run(x_AD, slots_AK, weights_AK, self.experts, overlap)

    def _slots(self, routing: Routing) -> Tensor:
        """[n, K]: where each choice is computed; ``num_experts`` is nowhere."""
        return self.get_buffer("slot_E")[routing.expert_ids_nK].masked_fill(~routing.kept_nK, self.config.num_experts)

    def _is_identity(self, routing: Routing) -> Tensor:
        first, ids_nK = self.config.num_experts, routing.expert_ids_nK
        return (ids_nK >= first) & (ids_nK < first + self.config.identity_experts)
