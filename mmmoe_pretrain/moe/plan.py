"""Which rows go to which local expert, and how their results are summed.

Index arithmetic between "one row per token" and "one row per assignment, sorted by expert", without weights and
ranks. Shapes: m rows, A assignments.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain import kernels
from mmmoe_pretrain.batch import send


class DeviceCounts(Sequence[int]):
    """The assignments of each local expert, of which a device has ``ends_E``, the int32 sums up to each expert. The
    host waits for them when it first reads one; for their number it does not."""

    def __init__(self, ends_E: Tensor) -> None:
        self.ends_E = ends_E

    @functools.cached_property
    def on_host(self) -> list[int]:
        return self.ends_E.diff(prepend=self.ends_E.new_zeros(1)).tolist()

    def __len__(self) -> int:
        return self.ends_E.shape[0]

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        return self.on_host[index]


@dataclass(frozen=True)
class ExpertPlan:
    """A assignments of m rows, sorted by local expert.

    ``rows_A``: the row that each assignment computes on. ``counts``: assignments of each local expert.
    ``place_A``: the positions in that order of row 0's assignments, then of row 1's, and so on; ``offsets_m``:
    where each row's begin in ``place_A``. ``unused_A``: True for assignments to nowhere, which come after all others
    and which the sums over a row's assignments include: their results must be 0 (``zero_unused_``). None: there are
    none.
    """

    rows_A: Tensor
    counts: Sequence[int]
    place_A: Tensor
    offsets_m: Tensor
    unused_A: Tensor | None = None

    @property
    def num_assignments(self) -> int:
        return self.rows_A.shape[0]

    @property
    def num_rows(self) -> int:
        return self.offsets_m.shape[0]

    @property
    def ends_E(self) -> Tensor:
        """Where each local expert's assignments end, int32 on the device."""
        if isinstance(self.counts, DeviceCounts):
            return self.counts.ends_E
        return to_device(list(itertools.accumulate(self.counts)), torch.int32, self.rows_A.device)

    @property
    def experts_A(self) -> Tensor:
        """The local expert of each assignment; of one to nowhere any."""
        if isinstance(self.counts, DeviceCounts):
            place_A = torch.arange(self.num_assignments, dtype=torch.int32, device=self.rows_A.device)
            return torch.searchsorted(self.ends_E, place_A, right=True).clamp_(max=len(self.counts) - 1)
        counts = to_device(self.counts, torch.int64, self.rows_A.device)
        experts = torch.arange(len(self.counts), device=counts.device)
        return experts.repeat_interleave(counts, output_size=self.num_assignments)

    def one_by_one(self) -> ExpertPlan:
        """The plan where each assignment has a row of its own, in the order of ``take_rows``."""
        rows_A = torch.arange(self.num_assignments, device=self.rows_A.device)
        return ExpertPlan(rows_A, self.counts, rows_A, rows_A, self.unused_A)

    def without_unused(self) -> ExpertPlan:
        """The assignments to experts alone; the host waits for their number where some may go nowhere."""
        return self if self.unused_A is None else self.part(0, sum(self.counts), self.counts)

    def part(self, start: int, end: int, counts: Sequence[int]) -> ExpertPlan:
        """Only the assignments ``start`` to ``end``, of the experts that ``counts`` are of."""
        inside_A = (self.place_A >= start) & (self.place_A < end)
        before = F.pad(inside_A.cumsum(0), (1, 0))
        kept = (~inside_A).byte().argsort(stable=True)[: end - start]  # a mask would make the host wait
        return ExpertPlan(self.rows_A[start:end], counts, self.place_A[kept] - start, before[self.offsets_m])

    def sum_by_row(self, y_AD: Tensor, weights_A: Tensor | None = None) -> Tensor:
        """[A, D] -> [m, D]: each row's assignments summed, times ``weights_A`` if given. No gradient."""
        if self.num_rows == 0:
            return y_AD.new_zeros(0, y_AD.shape[1])
        if kernels.usable(y_AD):
            from mmmoe_pretrain.kernels import sum_rows as fused

            return fused.sum_rows(y_AD, self.place_A, self.offsets_m, weights_A)
        weights = None if weights_A is None else weights_A.to(y_AD.dtype).index_select(0, self.place_A)
        return F.embedding_bag(self.place_A, y_AD, self.offsets_m, mode="sum", per_sample_weights=weights)


# rows [m, D], weight of each assignment [A] in the plan's order, the plan -> [m, D]
Compute = Callable[[Tensor, Tensor, ExpertPlan], Tensor]


def plan_of_slots(slots_nK: Tensor, num_slots: int) -> tuple[ExpertPlan, Tensor]:
    """The plan of tokens with K slots each, and the flat positions of its assignments in ``slots_nK`` [A].

    Slot ``num_slots`` means "not sent". The host waits for the counts.
    """
    slots, order = slots_nK.reshape(-1).sort(stable=True)
    ends = torch.searchsorted(slots, torch.arange(num_slots, device=slots.device), right=True)
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()  # bincount would wait once more
    order_A = order[: sum(counts)]
    sent_nK = (slots_nK < num_slots).long()
    position_nK = sent_nK.reshape(-1).cumsum(0).view_as(sent_nK) - sent_nK  # among what is sent, row by row
    place_A = inverse(position_nK.reshape(-1)[order_A])
    return ExpertPlan(order_A // slots_nK.shape[1], counts, place_A, position_nK[:, 0]), order_A


def plan_on_device(slots_nK: Tensor, num_slots: int, dropless: bool) -> tuple[ExpertPlan, Tensor]:
    """``plan_of_slots`` without a wait of the host, which then knows no counts: A is n K, and assignments to nowhere
    stay in the plan as unused. ``dropless``: there are none."""
    slots, order_A = slots_nK.reshape(-1).sort(stable=True)
    numbers = torch.arange(num_slots, device=slots.device, dtype=slots.dtype)
    ends_E = torch.searchsorted(slots, numbers, right=True, out_int32=True)
    top_k = slots_nK.shape[1]
    offsets_n = torch.arange(0, slots.numel(), top_k, device=slots.device)
    unused_A = None if dropless else slots == num_slots
    return ExpertPlan(order_A // top_k, DeviceCounts(ends_E), inverse(order_A), offsets_n, unused_A), order_A


def plan_of_runs(experts_A: Tensor, first_A: Tensor, counts: list[int], num_rows: int) -> tuple[ExpertPlan, Tensor]:
    """The plan of assignments that are given row by row, and their order in it [A].

    ``experts_A``: local expert. ``first_A``: 1 where a row's run of assignments begins, else 0; each
    row has one at least. ``counts``: assignments of each local expert.
    """
    rows_A = first_A.cumsum(0) - 1
    order_A = experts_A.argsort(stable=True)
    offsets_m = torch.searchsorted(rows_A, torch.arange(num_rows, device=rows_A.device))
    return ExpertPlan(rows_A[order_A], counts, inverse(order_A), offsets_m), order_A


def inverse(order: Tensor) -> Tensor:
    """The position of each element in a permutation."""
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    return place


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_mD: Tensor, plan: ExpertPlan) -> Tensor:
        ctx.plan = plan
        return x_mD.index_select(0, plan.rows_A)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.plan.sum_by_row(grad), None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, plan: ExpertPlan) -> Tensor:
        ctx.plan = plan
        return plan.sum_by_row(y_AD)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.plan.rows_A), None


def take_rows(x_mD: Tensor, plan: ExpertPlan) -> Tensor:
    """[m, D] -> [A, D], sorted by expert; differentiable."""
    return _TakeRows.apply(x_mD, plan)


def sum_rows(y_AD: Tensor, plan: ExpertPlan) -> Tensor:
    """[A, D] -> [m, D], each row's assignments summed; differentiable."""
    return _SumRows.apply(y_AD, plan)


def zero_unused_(x_A: Tensor, plan: ExpertPlan) -> Tensor:
    """``x_A`` [A, ...] with zeros for assignments to nowhere, in place; so is its gradient. Products leave their rows
    unwritten, and a row's sum includes them."""
    if plan.unused_A is None:
        return x_A
    return x_A.masked_fill_(plan.unused_A.view(-1, *[1] * (x_A.ndim - 1)), 0)


def to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table from the host, without waiting for the device."""
    return send(torch.tensor(values, dtype=dtype), device)
