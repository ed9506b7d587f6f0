"""Dispatchers: they move tokens to their experts and bring the results back.

Both dispatchers have one interface and give the same result. A *slot* is the position of an expert in the order
(rank, local index); slot E means that the assignment is not sent (dropped, or an expert without computation).

All-to-all: a token that goes to several experts of one rank is sent there once. With each row go 8 bytes an
assignment (expert and weight); the receiver expands rows by an ``ExpertPlan`` and sums a row's experts, so that one
row a (token, rank) returns; a token's rows are summed on its own rank. The host learns all sizes in one
synchronisation. The stream is cut into C chunks: all are sent at once, and each is computed while later ones, and
the results of earlier ones, are in transfer.

Shapes: n tokens, K slots a token, A = n K assignments, R ranks, L local experts (slots a rank), m rows received. A
*bin* is a (chunk, destination rank); assignments to nowhere are in bin C R.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.moe.plan import (
    Compute,
    ExpertPlan,
    plan_of_runs,
    plan_of_slots,
    sort_slots,
    sum_rows,
    take_rows,
)
from mmmoe_pretrain.parallel.collectives import RowExchange, exchange_counts
from mmmoe_pretrain.parallel.groups import Group, Groups

Overlap = Callable[[], Tensor]


@dataclass(frozen=True)
class LocalDispatcher:
    """All experts are in this process: assignments are only sorted."""

    num_slots: int

    def run(
        self,
        x_nD: Tensor,
        slots_nK: Tensor,
        weights_nK: Tensor,
        compute: Compute,
        overlap: Overlap | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The weighted sum of each token's experts [n, D], and the result of ``overlap``, which is called while
        tokens are in transfer."""
        order, place, counts = sort_slots(slots_nK, self.num_slots)
        plan = plan_of_slots(order, place, counts.tolist(), slots_nK.shape[1])
        weights_A = weights_nK.reshape(-1).index_select(0, order[: plan.num_assignments])
        return compute(x_nD, weights_A, plan), overlap() if overlap else None


@dataclass(frozen=True)
class AllToAllDispatcher:
    """Slot s is local expert s % L of rank s // L of ``groups.expert``; slot ``num_slots`` is nowhere."""

    num_slots: int
    groups: Groups
    num_chunks: int = 1

    def run(
        self,
        x_nD: Tensor,
        slots_nK: Tensor,
        weights_nK: Tensor,
        compute: Compute,
        overlap: Overlap | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``LocalDispatcher.run``. Weights are sent in fp32."""
        sorted_ = _sort_into_bins(slots_nK, self.num_slots, self.groups.expert_size, self.num_chunks)
        sizes = _exchange_sizes(sorted_.counts_RCL, self.groups.expert)
        weights_A = weights_nK.reshape(-1).float()
        chunks = _chunks(sorted_, sizes, x_nD, weights_A, self.groups.expert)
        for chunk in chunks:
            chunk.send()
        extra = overlap() if overlap else None
        for chunk in chunks:
            chunk.compute(compute)
        parts = [chunk.gather() for chunk in chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts), extra


@dataclass(frozen=True)
class _Sorted:
    """Assignments by rising bin, then token; a row is a run of them with one bin and token.

    ``order_A``: flat assignments in that order. ``codes_A``: int32, twice the local expert, plus 1
    where a row begins. ``token_of_row``, ``rows_by_token``, ``first_row_n``: the token of each row;
    the rows in the order of tokens; and where each token's rows begin in that. The first two are
    longer than there are rows. ``counts_RCL``: [R, C, 1 + L], rows and assignments of each expert.
    """

    order_A: Tensor
    codes_A: Tensor
    token_of_row: Tensor
    rows_by_token: Tensor
    first_row_n: Tensor
    counts_RCL: Tensor


def _chunk_size(num_tokens: int, chunks: int) -> int:
    return max(1, -(-num_tokens // chunks))


def _sort_into_bins(slots_nK: Tensor, num_slots: int, ranks: int, chunks: int) -> _Sorted:
    """The part of the send plan that needs no size on the host."""
    num_tokens, top_k = slots_nK.shape
    local = num_slots // ranks
    nowhere = chunks * ranks
    slots_A = slots_nK.reshape(-1).to(torch.int32)  # small keys sort faster
    token_A = torch.arange(num_tokens * top_k, device=slots_A.device) // top_k
    bins_A = token_A // _chunk_size(num_tokens, chunks) * ranks + slots_A // local
    bins_A = torch.where(slots_A < num_slots, bins_A, nowhere).to(torch.int32)
    bins_A, order_A = bins_A.sort(stable=True)
    token_A, expert_A = token_A[order_A], slots_A[order_A] % local
    first_A = (_begins_run(bins_A) | _begins_run(token_A)) & (bins_A < nowhere)
    row_A = first_A.cumsum(0) - 1
    unused = slots_A.numel()  # what is not a row's first assignment is written after the rows
    token_of_row = _scatter(torch.where(first_A, row_A, unused), token_A)
    first_nK = torch.empty_like(row_A).scatter_(0, order_A, first_A.long())
    position_nK = first_nK.cumsum(0) - 1
    rows_by_token = _scatter(torch.where(first_A, position_nK[order_A], unused), row_A)
    return _Sorted(
        order_A,
        expert_A * 2 + first_A,
        token_of_row,
        rows_by_token,
        (position_nK + 1 - first_nK).view(num_tokens, top_k)[:, 0],
        _count(bins_A, expert_A, first_A, nowhere, local).view(chunks, ranks, 1 + local).transpose(0, 1),
    )


def _begins_run(values_A: Tensor) -> Tensor:
    """Where a value of at least 0 differs from the one before."""
    return values_A.diff(prepend=values_A.new_full((1,), -1)) != 0


def _scatter(places: Tensor, values: Tensor) -> Tensor:
    return values.new_zeros(values.numel() + 1).scatter_(0, places, values)


def _count(bins_A: Tensor, expert_A: Tensor, first_A: Tensor, bins: int, local: int) -> Tensor:
    """[bins, 1 + L]: rows, and assignments of each local expert."""
    counts = bins_A.new_zeros((bins + 1) * (1 + local))
    start_A = bins_A.long() * (1 + local)
    counts.scatter_add_(0, start_A, first_A.to(counts.dtype))
    counts.scatter_add_(0, start_A + 1 + expert_A, torch.ones_like(bins_A))
    return counts[: bins * (1 + local)]


@dataclass(frozen=True)
class _Sizes:
    """The sizes of one chunk: rows and assignments to and from each rank, and assignments of each local expert."""

    rows_out: list[int]
    rows_in: list[int]
    assignments_out: list[int]
    assignments_in: list[int]
    experts: list[int]


def _exchange_sizes(counts_RCL: Tensor, group: Group) -> list[_Sizes]:
    """The sizes of every chunk. The only place where the host waits for the device."""
    both = torch.stack([counts_RCL, exchange_counts(counts_RCL, group)])
    out, in_ = np.asarray(both.tolist(), dtype=np.int64)
    return [
        _Sizes(
            out[:, c, 0].tolist(),
            in_[:, c, 0].tolist(),
            out[:, c, 1:].sum(1).tolist(),
            in_[:, c, 1:].sum(1).tolist(),
            in_[:, c, 1:].sum(0).tolist(),
        )
        for c in range(counts_RCL.shape[1])
    ]


class _Chunk:
    """One chunk of the stream: ``send``, then ``compute``, then ``gather``.

    ``home``: the plan of this chunk's rows, with ranks in place of experts.
    """

    def __init__(
        self, x_nD: Tensor, weights_A: Tensor, codes_A: Tensor, home: ExpertPlan, sizes: _Sizes, group: Group
    ) -> None:
        self.x_nD, self.weights_A, self.codes_A = x_nD, weights_A, codes_A
        self.home, self.sizes = home, sizes
        self.assignments = RowExchange(sizes.assignments_out, sizes.assignments_in, group)
        self.there = RowExchange(sizes.rows_out, sizes.rows_in, group)
        self.back = RowExchange(sizes.rows_in, sizes.rows_out, group)

    def send(self) -> None:
        self.assignments.start(self.weights_A, self.codes_A)
        self.there.start(take_rows(self.x_nD, self.home))

    def compute(self, compute: Compute) -> None:
        weights_B, codes_B = self.assignments.wait_with_metadata()
        plan, order_B = plan_of_runs(codes_B // 2, codes_B % 2, self.sizes.experts, sum(self.sizes.rows_in))
        self.back.start(compute(self.there.wait(), weights_B.index_select(0, order_B), plan))

    def gather(self) -> Tensor:
        return sum_rows(self.back.wait(), self.home)


def _chunks(sorted_: _Sorted, sizes: list[_Sizes], x_nD: Tensor, weights_A: Tensor, group: Group) -> list[_Chunk]:
    num_tokens, size = x_nD.shape[0], _chunk_size(x_nD.shape[0], len(sizes))
    tokens = [max(0, min(size, num_tokens - size * c)) for c in range(len(sizes))]
    assignments = [sum(s.assignments_out) for s in sizes]
    weights_of = weights_A.index_select(0, sorted_.order_A[: sum(assignments)]).split(assignments)
    codes_of = sorted_.codes_A[: sum(assignments)].split(assignments)
    x_of = x_nD.split(tokens)  # one node, whose backward pass is one concatenation
    made, first_token, first_row = [], 0, 0
    for c, s in enumerate(sizes):
        rows = slice(first_row, first_row + sum(s.rows_out))
        home = ExpertPlan(
            sorted_.token_of_row[rows] - first_token,
            s.rows_out,
            sorted_.rows_by_token[rows] - first_row,
            sorted_.first_row_n[first_token : first_token + tokens[c]] - first_row,
            complete=True,
        )
        made.append(_Chunk(x_of[c], weights_of[c], codes_of[c], home, s, group))
        first_token, first_row = first_token + tokens[c], rows.stop
    return made


Dispatcher = LocalDispatcher | AllToAllDispatcher


def make_dispatcher(config: MoEConfig, groups: Groups) -> Dispatcher:
    """Local where this process holds every expert, else all-to-all."""
    if groups.expert_size == 1:
        return LocalDispatcher(config.num_experts)
    return AllToAllDispatcher(config.num_experts, groups, config.dispatch_chunks)
