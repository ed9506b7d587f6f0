"""Limited room at the experts: which assignments are kept, and which tokens go first."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expert_capacity(capacity_factor: float, num_tokens: int, top_k: int, num_experts: int) -> int:
    """C = ceil(c T K / E), counted on this data-parallel rank as in GShard (arXiv 2006.16668)."""
    room = capacity_factor * num_tokens * top_k / num_experts
    return math.ceil(round(room, 6))  # 1.1 * 50 is 55.00000000000001, and no room for 56


def within_capacity(ids_nK: Tensor, capacity: int, priority_n: Tensor | None) -> Tensor:
    """Which assignments find room: at most ``capacity`` an expert.

    All first choices are placed before any second choice. Within a choice, tokens go by falling
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
