"""Lending of experts: ranks with few rows compute some rows of the experts of ranks with many.

After least-loaded expert parallelism (arXiv 2601.17111), with the plan in closed form. The rows that each rank has
above the mean, those of its experts with the most rows first, are laid end to end, and so are the places that the
other ranks have below it; where two stretches overlap, the rows of that expert go to that rank. All ranks compute the
same plan from the same counts, on the device. This file plans which rows and weights move, and moves the weights;
``dispatch.py`` moves the rows.

When it pays. A row costs the slowest rank 6 P operations, forward and backward, where P is the number of weights of
an expert. A lent expert costs b bytes a weight forward, and b for its gradient on the way back. P cancels: n rows
take longer than that transfer where n > 2 b rate / (6 link), of FLOP/s and bytes/s (``rows_that_pay``).

Shapes: E experts, by slot; R ranks; L = E / R local experts; S the most experts that a rank computes for others; n
tokens, K slots a token, A = n K. A rank's local experts are its own L, then those that it borrows. A row is one
assignment here: what one expert computes of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmmoe_pretrain.config.moe import LendingConfig
from mmmoe_pretrain.moe.plan import to_device
from mmmoe_pretrain.parallel.collectives import RowExchange, gather_rows
from mmmoe_pretrain.parallel.groups import Group, Groups


def rows_that_pay(flop_rate: float, link_rate: float, weight_bytes: int) -> float:
    """The rows of an expert for whose computation, forward and backward, a rank needs as long as for sending the
    expert's weights and getting their gradients."""
    return 2 * weight_bytes * flop_rate / (6 * link_rate)


@dataclass(frozen=True)
class Shares:
    """``rows_ER``: the rows of each expert that each rank computes. ``borrowed_RS``: the experts of others among
    them, rising; E for none."""

    rows_ER: Tensor
    borrowed_RS: Tensor

    @property
    def slots_per_rank(self) -> int:
        num_experts, ranks = self.rows_ER.shape
        return num_experts // ranks + self.borrowed_RS.shape[1]

    @property
    def summary(self) -> Tensor:
        """Rows of the fullest rank without and with lending, rows of a rank on average, and the number of lent
        experts, fp32 [4]; a share of each on every rank, so that they add up over ranks and expert groups."""
        num_experts, ranks = self.rows_ER.shape
        before_R, after_R = self.rows_ER.sum(1).view(ranks, -1).sum(1), self.rows_ER.sum(0)
        lent = (self.borrowed_RS < num_experts).sum()
        return torch.stack([before_R.max(), after_R.max(), after_R.sum() / ranks, lent]).float() / ranks

    @property
    def slots_ER(self) -> Tensor:
        """The slot of each expert on each rank, in the order (rank, local index); 0 where a rank does not have it."""
        (num_experts, ranks), lent = self.rows_ER.shape, self.borrowed_RS.shape[1]
        local, ids_E, ids_R = num_experts // ranks, _arange(num_experts, self.rows_ER), _arange(ranks, self.rows_ER)
        first_R, owner_E = ids_R * self.slots_per_rank, ids_E // local
        slots = self.rows_ER.new_zeros(num_experts + 1, ranks)  # the last row takes what is no expert
        slots.scatter_(0, self.borrowed_RS.t(), first_R + local + _arange(lent, self.rows_ER)[:, None])
        return slots[:num_experts].scatter(1, owner_E[:, None], (first_R[owner_E] + ids_E % local)[:, None])


def share_rows(totals_E: Tensor, ranks: int, config: LendingConfig) -> Shares:
    """``totals_E``: the rows of each expert, of all ranks."""
    totals_RL = totals_E.view(ranks, -1)
    (_, local), load_R = totals_RL.shape, totals_RL.sum(1)
    even = (load_R.sum() + ranks - 1) // ranks
    too_full = load_R.max() * ranks > config.threshold * load_R.sum().double()
    surplus_R, room_R = (load_R - even).clamp(min=0) * too_full, (even - load_R).clamp(min=0)
    from_R, to_R = (x.argsort(descending=True, stable=True) for x in (surplus_R, room_R))
    most_RL, index_RL = totals_RL.sort(dim=1, descending=True, stable=True)
    lent_RL = (surplus_R[:, None] - most_RL.cumsum(1) + most_RL).clamp(min=0).minimum(most_RL)
    lent_E, room_R = lent_RL[from_R].reshape(-1), room_R[to_R]
    expert_E = (index_RL + _arange(ranks, totals_E)[:, None] * local)[from_R].reshape(-1)
    moved_ER = _overlap(lent_E.cumsum(0)[:, None], lent_E[:, None], room_R.cumsum(0), room_R)
    moved_ER = torch.zeros_like(moved_ER).index_put((expert_E[:, None], to_R), moved_ER)
    moved_ER = moved_ER * (moved_ER >= config.min_rows)
    kept_ER, borrowed_ER = moved_ER.sort(dim=0, descending=True, stable=True)
    most = min(config.max_experts, len(totals_E) - local)
    kept_SR, borrowed_SR = kept_ER[:most], borrowed_ER[:most]
    rows_ER = torch.zeros_like(moved_ER).scatter(0, borrowed_SR, kept_SR)
    owns_ER = _arange(len(totals_E), totals_E)[:, None] // local == _arange(ranks, totals_E)
    rows_ER = torch.where(owns_ER, (totals_E - rows_ER.sum(1))[:, None], rows_ER)
    borrowed_SR = torch.where(kept_SR > 0, borrowed_SR, len(totals_E))
    return Shares(rows_ER, borrowed_SR.sort(dim=0).values.t())


def rows_to_ranks(counts_RE: Tensor, rows_ER: Tensor, rank: int) -> Tensor:
    """[E, R]: of ``rank``'s rows of each expert, how many go to each rank. ``counts_RE``: the rows that each rank
    has. A rank first computes rows of its own, which need no transfer."""
    counts_ER = counts_RE.t()
    stay_ER = counts_ER.minimum(rows_ER)
    leave_ER, come_ER = counts_ER - stay_ER, rows_ER - stay_ER
    ends_E1, sizes_E1 = leave_ER.cumsum(1)[:, rank, None], leave_ER[:, rank, None]
    to_ER = _overlap(ends_E1, sizes_E1, come_ER.cumsum(1), come_ER)
    return torch.where(_arange(rows_ER.shape[1], rows_ER) == rank, to_ER + stay_ER, to_ER)


def slots_with_lending(
    slots_nK: Tensor, num_slots: int, config: LendingConfig, groups: Groups
) -> tuple[Tensor, Shares]:
    """The slots of tokens among the experts that ranks have or borrow. Collective over ``groups.expert``."""
    slots_A, order_A = slots_nK.reshape(-1).to(torch.int32).sort(stable=True)
    ends_E = torch.searchsorted(slots_A, _arange(num_slots, slots_A), right=True)
    counts_1E = ends_E.diff(prepend=ends_E.new_zeros(1))[None]
    counts_RE = gather_rows(counts_1E.to(torch.int32), groups.expert).long()
    shares = share_rows(counts_RE.sum(0), groups.expert_size, config)
    to_ER = rows_to_ranks(counts_RE, shares.rows_ER, groups.expert_rank)
    part_A = torch.searchsorted(to_ER.reshape(-1).cumsum(0), _arange(len(slots_A), to_ER), right=True)
    nowhere = to_ER.new_full((1,), groups.expert_size * shares.slots_per_rank)
    new_A = torch.cat([shares.slots_ER.reshape(-1), nowhere])[part_A]
    return torch.empty_like(new_A).scatter_(0, order_A, new_A).view_as(slots_nK), shares


def _overlap(ends: Tensor, sizes: Tensor, other_ends: Tensor, other_sizes: Tensor) -> Tensor:
    """How much two stretches of a line have in common."""
    return (ends.minimum(other_ends) - (ends - sizes).maximum(other_ends - other_sizes)).clamp(min=0)


def _arange(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=like.dtype)


@dataclass(frozen=True)
class Loans:
    """The experts whose weights are sent in one layer: ``lent`` are local experts of this rank, ``send[r]`` of them
    for rank r, in this order; ``receive[r]`` come from rank r."""

    lent: list[int]
    send: list[int]
    receive: list[int]
    group: Group

    @classmethod
    def of(cls, borrowed_RS: np.ndarray, local: int, groups: Groups) -> Loans | None:
        """``borrowed_RS``: see ``Shares``. None where no rank lends anything."""
        ranks, rank = groups.expert_size, groups.expert_rank
        owner_RS = borrowed_RS // local
        if (owner_RS == ranks).all():
            return None
        mine_RS = owner_RS == rank
        lent = borrowed_RS[mine_RS] - rank * local
        receive = [int((owner_RS[rank] == r).sum()) for r in range(ranks)]
        return cls(lent.tolist(), mine_RS.sum(1).tolist(), receive, groups.expert)

    @property
    def num_borrowed(self) -> int:
        return sum(self.receive)

    def start(self, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[RowExchange]]:
        """Send the lent experts of each stack. The stacks to compute with instead, so that the gradients of lent
        weights, which return in the backward pass, are added to theirs; and the transfers of the borrowed ones."""
        index = to_device(self.lent, torch.int64, weights[0].device)
        own, arriving = [], []
        for weight in weights:
            stack, rows = _Lend.apply(weight, index, self.lent)
            arriving.append(RowExchange(self.send, self.receive, self.group))
            arriving[-1].start(rows)
            own.append(stack)
        return own, arriving


class _Lend(torch.autograd.Function):
    """A stack of weights, and copies of some of its experts. The gradients of the copies are added to the stack's in
    place: the experts' backward pass made it for this node alone, and a sum of two stacks would cost more."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor, lent: list[int]) -> tuple[Tensor, Tensor]:
        ctx.lent = lent
        return weight.view_as(weight), weight.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_lent: Tensor) -> tuple[Tensor, None, None]:
        for row, expert in enumerate(ctx.lent):  # in this order, also where an expert was lent twice
            grad[expert] += grad_lent[row]
        return grad, None, None


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, *empty: Tensor) -> Tensor:
        # A block is recomputed, with its collectives, when its first saved tensor is read. Here that must be before
        # the backward pass of the transfers, as on ranks whose borrowed experts read one.
        ctx.save_for_backward(*empty)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(x) for x in ctx.saved_tensors)


def keep_in_graph(y: Tensor, empty: Sequence[Tensor]) -> Tensor:
    """y. Its gradient also starts the backward pass of ``empty``: of transfers that brought nothing here, which all
    ranks make together."""
    return _Keep.apply(y, *empty)
