"""The values between router, dispatcher and losses: what a router is given, and what it decides.

Nothing here knows of communication. Tokens are the valid ones only (n of them): padding never
reaches a router. Shapes: x_nD, logits_nE, expert_ids_nK.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import TokenInfo


@dataclass(frozen=True)
class RouterInputs:
    """What the functions of ``moe/routers/`` choose from.

    ``logits_nE``: fp32, differentiable; experts that a token may not choose are at ``MASKED``.
    ``bias_nE``: added to the scores for the choice alone, [n, E] or [1, E], or None (bias balancing).
    ``noise_std_nE``: learned standard deviations of noisy_top_k, and ``normal_nE``: standard normal
    draws for them; None outside training and for other routers.
    """

    logits_nE: Tensor
    tokens: TokenInfo
    config: MoEConfig
    bias_nE: Tensor | None = None
    noise_std_nE: Tensor | None = None
    normal_nE: Tensor | None = None

    def for_choice(self, scores_nE: Tensor) -> Tensor:
        """Scores as the choice sees them; the bias never reaches a weight or a gradient, and lifts no
        expert over the mask."""
        seen_nE = scores_nE.detach()
        if self.bias_nE is not None:
            seen_nE = seen_nE + self.bias_nE
        return seen_nE.masked_fill(self.masked_nE, -math.inf) if self.config.expert_groups else seen_nE

    @property
    def masked_nE(self) -> Tensor:
        """True where a token may not choose the expert."""
        return self.logits_nE == MASKED


@dataclass(frozen=True)
class Choice:
    """Experts before capacity, best first. Weights are differentiable; ``log_p_nE`` is the log of the
    routing distribution, for losses and telemetry. ``priority_n``, for batch-priority routing: a token's
    largest score before any bias, of all experts. ``kept_nK`` is None where every entry is an assignment;
    else (expert choice) the others are none at all, neither counted nor dropped, and capacity has been
    seen to."""

    expert_ids_nK: Tensor
    weights_nK: Tensor
    log_p_nE: Tensor
    priority_n: Tensor
    kept_nK: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """A router's decision: ``kept_nK`` is False where an expert was full, and the weight there 0.
    ``log_p_nE`` is the log of the routing distribution, for reports of single tokens. ``memory_nR``: the state for
    the next router, where there is one (``routing_memory.py``)."""

    expert_ids_nK: Tensor
    weights_nK: Tensor
    kept_nK: Tensor
    stats: RoutingStats
    log_p_nE: Tensor
    memory_nR: Tensor | None = None


MASKED = -1e30  # finite, so that 0 * MASKED is 0 and entropies stay numbers


def chosen_weights(log_scores_nK: Tensor, config: MoEConfig) -> Tensor:
    """Scores, divided by their sum where ``renormalize`` and K > 1: at K = 1 that would be the constant
    1, and the router would learn nothing. From logs, so that scores too small for fp32 still sum to 1."""
    if not config.renormalize or log_scores_nK.shape[-1] < 2:
        return log_scores_nK.exp()
    return log_scores_nK.softmax(-1)


def choose_top_k(inputs: RouterInputs, seen_nE: Tensor, log_scores_nE: Tensor, log_p_nE: Tensor) -> Choice:
    """The K experts of the largest ``seen_nE`` (of ``for_choice``), weighed by their scores."""
    ids_nK = seen_nE.topk(inputs.config.experts_per_token, dim=-1).indices
    weights_nK = chosen_weights(log_scores_nE.gather(-1, ids_nK), inputs.config)
    return Choice(ids_nK, weights_nK, log_p_nE, log_scores_nE.detach().amax(-1).exp())


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """C = ceil(c T K / E), counted on this data-parallel rank as in GShard (arXiv 2006.16668)."""
    room = capacity_factor * num_tokens * top_k / num_experts
    return math.ceil(round(room, 6))  # 1.1 * 50 is 55.00000000000001, and no room for 56


def within_capacity(ids_nK: Tensor, capacity: int, priority_n: Tensor | None) -> Tensor:
    """Which assignments find room: at most ``capacity`` an expert.

    All first choices are placed before any second choice. Within a choice, tokens are placed by falling
    ``priority_n`` (batch-priority routing, V-MoE, arXiv 2106.05974), or by position if None. A token whose
    priority is NaN goes last.
    """
    num_tokens, top_k = ids_nK.shape
    order_n = torch.arange(num_tokens, device=ids_nK.device)
    if priority_n is not None:
        order_n = priority_n.nan_to_num(nan=-math.inf).argsort(descending=True, stable=True)
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
