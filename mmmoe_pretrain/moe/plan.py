"""Which rows go to which local expert, and how their results are summed.

Index arithmetic between "one row per token" and "one row per assignment, sorted by expert", without weights and
ranks. Shapes: m rows, A assignments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ExpertPlan:
    """A assignments of m rows, sorted by local expert.

    ``rows_A``: the row that each assignment computes on. ``counts``: assignments of each local
    expert. ``place``: the positions of each row's assignments in that order: [m, K], or flat with
    ``offsets_m`` (the start of each row's run) where rows have different numbers; an entry of A means
    "none" and adds nothing; where ``complete`` there is none such.
    """

    rows_A: Tensor
    counts: list[int]
    place: Tensor
    offsets_m: Tensor | None = None
    complete: bool = False

    @property
    def num_assignments(self) -> int:
        return self.rows_A.shape[0]

    @property
    def num_rows(self) -> int:
        return self.place.shape[0] if self.offsets_m is None else self.offsets_m.shape[0]

    def experts_with_none(self) -> Tensor:
        """[A + 1]: the local expert of each assignment, and at the end their number, for "none"."""
        counts = to_device([*self.counts, 1], torch.int64, self.rows_A.device)
        experts = torch.arange(len(counts), device=counts.device)
        return experts.repeat_interleave(counts, output_size=self.num_assignments + 1)

    def one_by_one(self) -> ExpertPlan:
        """The plan where each assignment has a row of its own, in the order of ``take_rows``."""
        rows_A = torch.arange(self.num_assignments, device=self.rows_A.device)
        return ExpertPlan(rows_A, self.counts, rows_A[:, None], complete=True)

    def part(self, start: int, end: int, counts: list[int]) -> ExpertPlan:
        """Only the assignments ``start`` to ``end``, of the experts that ``counts`` are of."""
        inside = (self.place >= start) & (self.place < end)
        place = torch.where(inside, self.place - start, end - start)
        return ExpertPlan(self.rows_A[start:end], counts, place, self.offsets_m)

    def sum_by_row(self, y_AD: Tensor, weights_A: Tensor | None = None) -> Tensor:
        """[A + 1, D], the last row zeros -> [m, D]: each row's assignments summed, times ``weights_A`` if
        given. No gradient. Where the plan is complete the row of zeros may be missing.
        """
        if self.num_rows == 0:
            return y_AD.new_zeros(0, y_AD.shape[1])
        weights = None
        if weights_A is not None:
            padded = weights_A if self.complete else F.pad(weights_A, (0, 1))
            weights = padded.to(y_AD.dtype).index_select(0, self.place.reshape(-1)).view_as(self.place)
        return F.embedding_bag(self.place, y_AD, self.offsets_m, mode="sum", per_sample_weights=weights)


# rows [m, D], weight of each assignment [A] in the plan's order, the plan -> [m, D]
Compute = Callable[[Tensor, Tensor, ExpertPlan], Tensor]


def sort_slots(slots_nK: Tensor, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat assignments by rising slot (stable), the position of each then, and the counts [num_slots].

    Slot ``num_slots`` means "not sent" and sorts last.
    """
    slots, order = slots_nK.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(slots, torch.arange(num_slots, device=slots.device), right=True)
    return order, inverse(order), ends.diff(prepend=ends.new_zeros(1))  # bincount would synchronise


def inverse(order: Tensor) -> Tensor:
    """The position of each element in a permutation."""
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return place


def plan_of_slots(order: Tensor, place: Tensor, counts: list[int], top_k: int) -> ExpertPlan:
    """The plan of tokens with K slots each, from ``sort_slots``."""
    total = sum(counts)
    rows_A = order[:total].div(top_k, rounding_mode="floor")
    if total == order.numel():
        return ExpertPlan(rows_A, counts, place.view(-1, top_k), complete=True)
    kept = order[:total].sort().values  # row by row; dropped assignments, and those to nowhere, cost nothing
    rows = torch.arange(order.numel() // top_k, device=order.device)
    offsets_m = torch.searchsorted(kept.div(top_k, rounding_mode="floor"), rows)
    return ExpertPlan(rows_A, counts, place.index_select(0, kept), offsets_m, complete=True)


def plan_of_runs(experts_A: Tensor, first_A: Tensor, counts: list[int], num_rows: int) -> tuple[ExpertPlan, Tensor]:
    """The plan of assignments that are given row by row, and their order in it [A].

    ``experts_A``: local expert. ``first_A``: 1 where a row's run of assignments begins, else 0; each
    row has one at least. ``counts``: assignments of each local expert.
    """
    rows_A = first_A.cumsum(0) - 1
    order = experts_A.argsort(stable=True)
    offsets_m = torch.searchsorted(rows_A, torch.arange(num_rows, device=rows_A.device))
    return ExpertPlan(rows_A[order], counts, inverse(order), offsets_m, complete=True), order


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_mD: Tensor, plan: ExpertPlan) -> Tensor:
        ctx.plan = plan
        return x_mD.index_select(0, plan.rows_A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.plan.sum_by_row(_with_zero_row(grad, ctx.plan)), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, plan: ExpertPlan) -> Tensor:
        ctx.plan = plan
        return plan.sum_by_row(_with_zero_row(y_AD, plan))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.plan.rows_A), None


def _with_zero_row(y_AD: Tensor, plan: ExpertPlan) -> Tensor:
    return y_AD if plan.complete else torch.cat([y_AD, y_AD.new_zeros(1, y_AD.shape[1])])


def take_rows(x_mD: Tensor, plan: ExpertPlan) -> Tensor:
    """[m, D] -> [A, D], sorted by expert; differentiable."""
    return _TakeRows.apply(x_mD, plan)


def sum_rows(y_AD: Tensor, plan: ExpertPlan) -> Tensor:
    """[A, D] -> [m, D], each row's assignments summed; differentiable."""
    return _SumRows.apply(y_AD, plan)


def to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table from the host, without waiting for the device: a copy from memory that is not pinned would wait
    for all work that the device has been given."""
    table = torch.tensor(values, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
