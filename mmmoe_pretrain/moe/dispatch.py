"""Dispatchers: they move tokens to their experts and the results back.

A router decides, an expert computes; a dispatcher only moves. Both dispatchers here have one
interface, ``dispatch(x, routing) -> Dispatched`` and ``combine(y, dispatched) -> x``, and give
the same result. Dropped assignments do not travel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mmmoe_pretrain.moe.routing import Routing
from mmmoe_pretrain.parallel.collectives import all_to_all_rows, exchange_counts
from mmmoe_pretrain.parallel.groups import Groups


@dataclass(frozen=True)
class Dispatched:
    """Tokens at their experts: ``x_nD`` sorted by local expert, ``counts`` rows each.

    The rest is what ``combine`` needs: the token and weight of each assignment that left, the
    split sizes of the exchange, and the order in which the arrivals were sorted.
    """

    x_nD: Tensor
    counts: list[int]
    token_of_row: Tensor
    weight_of_row: Tensor
    num_tokens: int
    sent: list[int]
    received: list[int]
    arrival_order: Tensor | None


class Dispatcher(Protocol):
    def dispatch(self, x_nD: Tensor, routing: Routing) -> Dispatched: ...

    def combine(self, y_nD: Tensor, dispatched: Dispatched) -> Tensor: ...


@dataclass(frozen=True)
class LocalDispatcher:
    """All experts live in this process: sorting is all there is to do."""

    num_experts: int

    def dispatch(self, x_nD: Tensor, routing: Routing) -> Dispatched:
        tokens, weights, counts_E = _sort_by_expert(routing, self.num_experts)
        return Dispatched(
            x_nD.index_select(0, tokens), counts_E.tolist(), tokens, weights, x_nD.shape[0], [], [], None
        )

    def combine(self, y_nD: Tensor, dispatched: Dispatched) -> Tensor:
        return _weighted_sum(y_nD, dispatched)


@dataclass(frozen=True)
class AllToAllDispatcher:
    """Experts are spread over ``groups.expert`` in order of their global index.

    Rows leave sorted by global expert, so those for one rank are adjacent; arrivals come sorted
    by sender and are brought into the order of the local experts.
    """

    num_experts: int
    groups: Groups

    def dispatch(self, x_nD: Tensor, routing: Routing) -> Dispatched:
        ranks = self.groups.expert_size
        tokens, weights, counts_E = _sort_by_expert(routing, self.num_experts)
        leaving_RE = counts_E.view(ranks, -1)
        arriving_RE = exchange_counts(leaving_RE, self.groups.expert)
        sent, received, counts = torch.cat([leaving_RE.sum(1), arriving_RE.sum(1), arriving_RE.sum(0)]).split(
            [ranks, ranks, leaving_RE.shape[1]]
        )
        sent_list, received_list = sent.tolist(), received.tolist()
        arrived = all_to_all_rows(x_nD.index_select(0, tokens), sent_list, received_list, self.groups.expert)
        local_expert = torch.arange(leaving_RE.shape[1], device=x_nD.device).repeat(ranks)
        order = local_expert.repeat_interleave(arriving_RE.reshape(-1)).argsort(stable=True)
        return Dispatched(
            arrived.index_select(0, order),
            counts.tolist(),
            tokens,
            weights,
            x_nD.shape[0],
            sent_list,
            received_list,
            order,
        )

    def combine(self, y_nD: Tensor, dispatched: Dispatched) -> Tensor:
        assert dispatched.arrival_order is not None
        back = torch.empty_like(dispatched.arrival_order)
        back[dispatched.arrival_order] = torch.arange(back.numel(), device=back.device)
        returned = all_to_all_rows(
            y_nD.index_select(0, back), dispatched.received, dispatched.sent, self.groups.expert
        )
        return _weighted_sum(returned, dispatched)


def make_dispatcher(num_experts: int, groups: Groups) -> Dispatcher:
    """Local where this process holds every expert, else all-to-all."""
    if groups.expert_size == 1:
        return LocalDispatcher(num_experts)
    return AllToAllDispatcher(num_experts, groups)


def _sort_by_expert(routing: Routing, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token and weight of each kept assignment in the order of experts, and the counts [E]."""
    top_k = routing.expert_ids_nK.shape[1]
    kept = routing.kept_nK.reshape(-1).nonzero().squeeze(1)
    experts = routing.expert_ids_nK.reshape(-1).index_select(0, kept)
    assignments = kept.index_select(0, experts.argsort(stable=True))
    weights = routing.weights_nK.reshape(-1).index_select(0, assignments)
    tokens = assignments.div(top_k, rounding_mode="floor")
    return tokens, weights, torch.bincount(experts, minlength=num_experts)


def _weighted_sum(y_nD: Tensor, dispatched: Dispatched) -> Tensor:
    weighted = y_nD * dispatched.weight_of_row[:, None].to(y_nD.dtype)
    out = y_nD.new_zeros(dispatched.num_tokens, y_nD.shape[1])
    return out.index_add(0, dispatched.token_of_row, weighted)
