"""Dispatchers: they move tokens to their experts and bring the results back.

All dispatchers have one interface and give the same result. A *slot* is the position of an expert in the order
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

from mmmoe_pretrain.config.moe import LendingConfig, MoEConfig
from mmmoe_pretrain.moe.lending import Loans, slots_with_lending
from mmmoe_pretrain.moe.plan import (
    Compute,
    ExpertPlan,
    plan_of_runs,
    plan_of_slots,
    plan_on_device,
    sum_rows,
    take_rows,
    zero_unused_,
)
from mmmoe_pretrain.parallel.collectives import RowExchange, exchange_counts
from mmmoe_pretrain.parallel.groups import Groups

Overlap = Callable[[], Tensor]
Dispatched = tuple[Tensor, Tensor | None, Tensor | None]
LendingCompute = Callable[[Tensor, Tensor, ExpertPlan, Loans | None], Tensor]


@dataclass(frozen=True)
class LocalDispatcher:
    """All experts are in this process: assignments are only sorted. ``dropless``: no slot is nowhere.
    ``counts_on_host``: they are needed there; on a CPU they always are."""

    num_slots: int
    dropless: bool = False
    counts_on_host: bool = True

    def run(
        self, x_nD: Tensor, slots_nK: Tensor, weights_nK: Tensor, compute: Compute, overlap: Overlap | None = None
    ) -> Dispatched:
        """The weighted sum of each token's experts [n, D]; the result of ``overlap``, which is called while tokens
        are in transfer; and what lending did (``Shares.summary``), where it is on."""
        if self.counts_on_host or slots_nK.device.type == "cpu":
            plan, order_A = plan_of_slots(slots_nK, self.num_slots)
        else:
            plan, order_A = plan_on_device(slots_nK, self.num_slots, self.dropless)
        weights_A = zero_unused_(weights_nK.reshape(-1).index_select(0, order_A), plan)
        return compute(x_nD, weights_A, plan), overlap() if overlap else None, None


@dataclass(frozen=True)
class AllToAllDispatcher:
    """Slot s is local expert s % L of rank s // L of ``groups.expert``; slot ``num_slots`` is nowhere."""

    num_slots: int
    groups: Groups
    num_chunks: int = 1

    def run(
        self, x_nD: Tensor, slots_nK: Tensor, weights_nK: Tensor, compute: Compute, overlap: Overlap | None = None
    ) -> Dispatched:
        """See ``LocalDispatcher.run``. Weights are sent in fp32."""
        sizes = [len(part) for part in slots_nK.tensor_split(self.num_chunks)]
        split = zip(x_nD.split(sizes), slots_nK.split(sizes), weights_nK.float().split(sizes), strict=True)
        chunks = [_Chunk(x, slots, weights, self.num_slots, self.groups) for x, slots, weights in split]
        counts_RCL = torch.stack([chunk.counts_RL for chunk in chunks], dim=1)
        both = torch.stack([counts_RCL, exchange_counts(counts_RCL, self.groups.expert)])
        out_RCL, in_RCL = np.asarray(both.tolist(), dtype=np.int64)  # the only place where the host waits
        for c, chunk in enumerate(chunks):
            chunk.send(out_RCL[:, c], in_RCL[:, c])
        extra = overlap() if overlap else None
        for chunk in chunks:
            chunk.compute(compute)
        parts = [chunk.gather() for chunk in chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts), extra, None


@dataclass(frozen=True)
class LendingDispatcher:
    """All-to-all where ranks with few rows compute some of the experts of ranks with many (``lending.py``)."""

    num_slots: int
    groups: Groups
    config: LendingConfig

    def run(
        self,
        x_nD: Tensor,
        slots_nK: Tensor,
        weights_nK: Tensor,
        compute: LendingCompute,
        overlap: Overlap | None = None,
    ) -> Dispatched:
        """See ``AllToAllDispatcher.run``."""
        local, ranks = self.num_slots // self.groups.expert_size, self.groups.expert_size
        slots_nK, shares = slots_with_lending(slots_nK, self.num_slots, self.config, self.groups)
        chunk = _Chunk(x_nD, slots_nK, weights_nK.float(), ranks * shares.slots_per_rank, self.groups)
        counts = (chunk.counts_RL, exchange_counts(chunk.counts_RL, self.groups.expert), shares.borrowed_RS)
        table = np.asarray(torch.cat(counts, dim=1).tolist(), dtype=np.int64)  # the only place where the host waits
        width = 1 + shares.slots_per_rank
        loans = Loans.of(table[:, 2 * width :], local, self.groups)
        chunk.send(table[:, :width], table[:, width : 2 * width])
        extra = overlap() if overlap else None
        chunk.expert_counts = chunk.expert_counts[: local + (loans.num_borrowed if loans else 0)]
        chunk.compute(lambda x_mD, weights_A, plan: compute(x_mD, weights_A, plan, loans))
        return chunk.gather(), extra, shares.summary


class _Chunk:
    """One chunk of the stream: ``send``, then ``compute``, then ``gather``.

    Assignments are sorted by rising rank, then token; those to nowhere are last. A row is a run of them with one
    rank and token. ``order_A``: flat assignments in that order. ``codes_A``: int32, twice the local expert, plus 1
    where a row begins. ``token_of_row``, ``rows_by_token``, ``first_row_n``: the token of each row; the rows in the
    order of tokens; and where each token's rows begin in that. The first two are longer than there are rows, whose
    number the host learns for ``send``. ``counts_RL``: [R, 1 + L], rows and assignments of each expert.
    """

    def __init__(self, x_nD: Tensor, slots_nK: Tensor, weights_nK: Tensor, num_slots: int, groups: Groups) -> None:
        self.x_nD, self.weights_A, self.group = x_nD, weights_nK.reshape(-1), groups.expert
        (num_tokens, top_k), ranks = slots_nK.shape, groups.expert_size
        local = num_slots // ranks
        slots_A = slots_nK.reshape(-1).to(torch.int32)  # small keys sort faster
        rank_A, self.order_A = (slots_A // local).sort(stable=True)  # rank R is nowhere
        token_A, expert_A = self.order_A // top_k, slots_A[self.order_A] % local
        first_A = (_begins_run(rank_A) | _begins_run(token_A)) & (rank_A < ranks)
        self.codes_A = expert_A * 2 + first_A
        row_A = first_A.cumsum(0) - 1
        unused = slots_A.numel()  # what is not a row's first assignment is written after the rows
        self.token_of_row = _scatter(torch.where(first_A, row_A, unused), token_A)
        first_nK = torch.empty_like(row_A).scatter_(0, self.order_A, first_A.long())
        position_nK = first_nK.cumsum(0) - first_nK
        self.rows_by_token = _scatter(torch.where(first_A, position_nK[self.order_A], unused), row_A)
        self.first_row_n = position_nK.view(num_tokens, top_k)[:, 0]
        counts = rank_A.new_zeros((ranks + 1) * (1 + local))
        start_A = rank_A.long() * (1 + local)
        counts.scatter_add_(0, start_A, first_A.to(counts.dtype))
        counts.scatter_add_(0, start_A + 1 + expert_A, torch.ones_like(rank_A))
        self.counts_RL = counts.view(ranks + 1, 1 + local)[:ranks]

    def send(self, out_RL: np.ndarray, in_RL: np.ndarray) -> None:
        """``out_RL`` and ``in_RL``: the counts of what goes to each rank, and of what comes from it."""
        rows_out, rows_in = out_RL[:, 0].tolist(), in_RL[:, 0].tolist()
        rows, assignments = sum(rows_out), int(out_RL[:, 1:].sum())
        self.home = ExpertPlan(self.token_of_row[:rows], rows_out, self.rows_by_token[:rows], self.first_row_n)
        self.expert_counts, self.num_received = in_RL[:, 1:].sum(0).tolist(), sum(rows_in)
        self.assignments = RowExchange(out_RL[:, 1:].sum(1).tolist(), in_RL[:, 1:].sum(1).tolist(), self.group)
        self.there = RowExchange(rows_out, rows_in, self.group)
        self.back = RowExchange(rows_in, rows_out, self.group)
        weights_A = self.weights_A.index_select(0, self.order_A[:assignments])
        self.assignments.start(weights_A, self.codes_A[:assignments])
        self.there.start(take_rows(self.x_nD, self.home))

    def compute(self, compute: Compute) -> None:
        weights_B, codes_B = self.assignments.wait_with_metadata()
        plan, order_B = plan_of_runs(codes_B // 2, codes_B % 2, self.expert_counts, self.num_received)
        self.back.start(compute(self.there.wait(), weights_B.index_select(0, order_B), plan))

    def gather(self) -> Tensor:
        return sum_rows(self.back.wait(), self.home)


def _begins_run(values_A: Tensor) -> Tensor:
    """Where a value of at least 0 differs from the one before."""
    return values_A.diff(prepend=values_A.new_full((1,), -1)) != 0


def _scatter(places: Tensor, values: Tensor) -> Tensor:
    return values.new_zeros(values.numel() + 1).scatter_(0, places, values)


Dispatcher = LocalDispatcher | AllToAllDispatcher | LendingDispatcher


def make_dispatcher(config: MoEConfig, groups: Groups) -> Dispatcher:
    """Local where this process holds every expert, else all-to-all."""
    if groups.expert_size == 1:
        # Groups are stacks of their own, and expert choice has E slots a token, most of them nowhere.
        counted = bool(config.expert_groups) or config.router == "expert_choice"
        return LocalDispatcher(config.num_experts, config.dropless, counted)
    if config.lending is not None:
        return LendingDispatcher(config.num_experts, groups, config.lending)
    return AllToAllDispatcher(config.num_experts, groups, config.dispatch_chunks)
