"""Routers: they decide which experts serve a token, and with which weight.

Nothing here knows of communication. Tokens are the valid ones only (n of them): padding never
reaches a router. Shapes: x_nD, probabilities_nE, expert_ids_nK; M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmoe_pretrain.batch import MODALITIES
from mmmoe_pretrain.config import MoEConfig


@dataclass(frozen=True)
class RoutingStats:
    """Sums over this rank's tokens, by modality; sums so that ranks and steps can be added up.

    ``probability_ME``, ``entropy_M`` (nats) and ``z_sum`` carry gradients; the others are counts
    as floats. ``counts_ME`` are assignments (a token counts K times) before any drop.
    """

    probability_ME: Tensor
    entropy_M: Tensor
    z_sum: Tensor
    counts_ME: Tensor
    tokens_M: Tensor
    dropped_M: Tensor
    layer: int = 0

    def flatten(self) -> Tensor:
        """All sums in one vector, for one reduction; ``unflatten`` undoes it."""
        return torch.cat(
            [
                self.probability_ME.flatten(),
                self.entropy_M,
                self.z_sum.reshape(1),
                self.counts_ME.flatten(),
                self.tokens_M,
                self.dropped_M,
            ]
        )

    def unflatten(self, vector: Tensor) -> RoutingStats:
        """Stats of this layer and shape with the values of ``vector``."""
        modalities, experts = self.probability_ME.shape
        sizes = [modalities * experts, modalities, 1, modalities * experts, modalities, modalities]
        probability, entropy, z_sum, counts, tokens, dropped = vector.split(sizes)
        return RoutingStats(
            probability.view(modalities, experts),
            entropy,
            z_sum[0],
            counts.view(modalities, experts),
            tokens,
            dropped,
            self.layer,
        )


@dataclass(frozen=True)
class Routing:
    """A router's decision: ``kept_nK`` is False where an expert was full."""

    expert_ids_nK: Tensor
    weights_nK: Tensor
    kept_nK: Tensor
    stats: RoutingStats


def softmax_top_k(logits_nE: Tensor, modality_ids_n: Tensor, config: MoEConfig) -> Routing:
    """The K most probable experts of each token, under capacity if one is set.

    Weights are the probabilities, divided by their sum where ``renormalize`` and K > 1 (at K = 1
    that would be the constant 1, and the router would learn nothing).
    """
    top_k = config.experts_per_token
    log_p_nE = logits_nE.float().log_softmax(-1)
    p_nE = log_p_nE.exp()
    weights_nK, ids_nK = p_nE.topk(top_k, dim=-1)
    kept_nK = torch.ones_like(ids_nK, dtype=torch.bool)
    if config.capacity_factor is not None:
        capacity = expert_capacity(config.capacity_factor, ids_nK.shape[0], top_k, p_nE.shape[-1])
        priority_n = weights_nK[:, 0].detach() if config.batch_priority else None
        kept_nK = within_capacity(ids_nK, capacity, priority_n)
    if config.renormalize and top_k > 1:
        weights_nK = weights_nK / weights_nK.sum(-1, keepdim=True)
    stats = gather_stats(logits_nE.float(), log_p_nE, ids_nK, kept_nK, modality_ids_n)
    return Routing(ids_nK, weights_nK * kept_nK, kept_nK, stats)


ROUTERS: dict[str, Callable[[Tensor, Tensor, MoEConfig], Routing]] = {"softmax_top_k": softmax_top_k}


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """C = ceil(c T K / E), counted on this data-parallel rank as in GShard (arXiv 2006.16668)."""
    return math.ceil(capacity_factor * num_tokens * top_k / num_experts)


def within_capacity(ids_nK: Tensor, capacity: int, priority_n: Tensor | None) -> Tensor:
    """Which assignments find room: at most ``capacity`` an expert.

    All first choices are placed before any second choice. Within a choice, tokens go by falling
    ``priority_n`` (batch-priority routing, V-MoE, arXiv 2106.05974), or by position if None.
    """
    num_tokens, top_k = ids_nK.shape
    order_n = torch.arange(num_tokens, device=ids_nK.device)
    if priority_n is not None:
        order_n = priority_n.argsort(descending=True, stable=True)
    queue = ids_nK[order_n].t().reshape(-1)  # choice-major: [K * n]
    by_expert = queue.argsort(stable=True)
    sorted_ids = queue[by_expert]
    place = torch.arange(queue.numel(), device=queue.device)
    first = torch.searchsorted(sorted_ids, sorted_ids)  # where each expert's run begins
    kept_queue = torch.empty_like(queue, dtype=torch.bool)
    kept_queue[by_expert] = place - first < capacity
    kept_nK = torch.empty_like(ids_nK, dtype=torch.bool)
    kept_nK[order_n] = kept_queue.view(top_k, num_tokens).t()
    return kept_nK


def gather_stats(
    logits_nE: Tensor, log_p_nE: Tensor, ids_nK: Tensor, kept_nK: Tensor, modality_ids_n: Tensor
) -> RoutingStats:
    """Sums by modality of what the losses and the telemetry need."""
    num_experts, top_k = logits_nE.shape[-1], ids_nK.shape[-1]
    num_modalities = len(MODALITIES)
    p_nE = log_p_nE.exp()
    member_nM = torch.nn.functional.one_hot(modality_ids_n, num_modalities).to(p_nE.dtype)
    cell_nK = modality_ids_n[:, None] * num_experts + ids_nK
    counts = torch.bincount(cell_nK.reshape(-1), minlength=num_modalities * num_experts)
    return RoutingStats(
        probability_ME=member_nM.t() @ p_nE,
        entropy_M=-(member_nM.t() @ (p_nE * log_p_nE).sum(-1)),
        z_sum=logits_nE.logsumexp(-1).square().sum(),
        counts_ME=counts.view(num_modalities, num_experts).to(p_nE.dtype),
        tokens_M=member_nM.sum(0),
        dropped_M=member_nM.t() @ (top_k - kept_nK.sum(-1)).to(p_nE.dtype),
    )
