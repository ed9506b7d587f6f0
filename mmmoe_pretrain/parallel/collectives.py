"""Differentiable collectives. A group of None, or of one rank, is the identity.

The convention throughout: every rank's loss is a value whose *mean over the data-parallel
ranks* is the loss, and data-parallel reduction averages gradients. With backward passes that
sum over ranks, as here, a loss computed on every rank from reduced values then gets exactly
the gradient that one process would compute.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmmoe_pretrain.parallel.groups import Group


def group_size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks of ``group``, in new and contiguous memory; not differentiable."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


class _AllReduce(torch.autograd.Function):
    """Sums forward, backward, or both. megatron-core's reduce in place, and not at all what is not contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, forward: bool, backward: bool) -> Tensor:
        ctx.group, ctx.backward = group, backward
        return summed(x, group) if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return summed(grad, ctx.group) if ctx.backward else grad, None, None, None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        parts = [torch.empty_like(x) for _ in range(group_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # An all-reduce and a slice: gloo has no fast reduce-scatter, and the rows are few.
        out = summed(grad, ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return out[start : start + ctx.rows], None


class RowExchange:
    """One uneven all-to-all under way: ``send[r]`` rows leave for rank r of ``group``, and
    ``receive[r]`` rows come from it. ``start``, then ``wait``; both once.

    Differentiable, and as asynchronous backward as forward: autograd runs nodes in the reverse order
    of their making, so the gradient of ``wait`` starts the way back, the gradient of ``start`` waits
    for it, and computation in between stays in between. Between the two is an
    empty tensor, a ticket: no buffer is read before it is filled.
    """

    def __init__(self, send: list[int], receive: list[int], group: Group) -> None:
        self.send, self.receive, self.group = send, receive, group
        self._under_way: tuple[dist.Work | None, Tensor, Tensor] | None = None
        self._ticket: Tensor | None = None

    def start(self, x: Tensor, metadata: Tensor | None = None) -> None:
        """x: [sum(send), ...]. ``metadata``: int32 beside x: fp32 [sum(send)]; sent in the same message, 8 bytes a
        row, without a gradient."""
        self._ticket = _StartExchange.apply(x, metadata, self)

    def wait(self) -> Tensor:
        """[sum(receive), ...], in the order of the senders."""
        return _WaitExchange.apply(self._take_ticket(), False, self)[0]

    def wait_with_metadata(self) -> tuple[Tensor, Tensor]:
        """The received x and metadata, both [sum(receive)]."""
        return _WaitExchange.apply(self._take_ticket(), True, self)

    def _take_ticket(self) -> Tensor:
        ticket, self._ticket = self._ticket, None
        assert ticket is not None, "wait without start"
        return ticket

    def issue(self, x: Tensor, send: list[int], receive: list[int]) -> None:
        """Start the transfer of x."""
        x = x.contiguous()
        if group_size(self.group) == 1:
            self._under_way = (None, x.view_as(x), x)
            return
        out = x.new_empty((sum(receive), *x.shape[1:]))
        work = dist.all_to_all_single(out, x, receive, send, group=self.group, async_op=True)
        self._under_way = (work, out, x)  # x must outlive the transfer

    def arrive(self) -> Tensor:
        """The result of ``issue``."""
        assert self._under_way is not None
        (work, out, _), self._under_way = self._under_way, None
        if work is not None:
            work.wait()
        return out


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, metadata: Tensor | None, exchange: RowExchange) -> Tensor:
        ctx.exchange = exchange
        packed = x if metadata is None else torch.stack([x.view(torch.int32), metadata], dim=1)
        exchange.issue(packed, exchange.send, exchange.receive)
        return x.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ticket: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.arrive(), None, None


class _WaitExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, metadata: bool, exchange: RowExchange) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        arrived = exchange.arrive()
        if not metadata:
            return (arrived,)
        x, arrived_metadata = arrived[:, 0].contiguous().view(torch.float32), arrived[:, 1].contiguous()
        ctx.mark_non_differentiable(arrived_metadata)
        return x, arrived_metadata

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_metadata: Tensor) -> tuple[Tensor, None, None]:
        ctx.exchange.issue(grad, ctx.exchange.receive, ctx.exchange.send)
        return grad.new_empty(0), None, None


def all_reduce_sum(x: Tensor, group: Group, forward: bool = True, backward: bool = True) -> Tensor:
    """x summed over the ranks of ``group`` (``forward``), and its gradient likewise (``backward``)."""
    return x if group_size(group) == 1 else _AllReduce.apply(x, group, forward, backward)


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """[n, ...] of every rank stacked in rank order, [ranks * n, ...], differentiable.

    Every rank must bring the same n.
    """
    return x if group_size(group) == 1 else _GatherRows.apply(x, group)


def exchange_counts(counts_RE: Tensor, group: Group) -> Tensor:
    """Row r goes to rank r; row r of the result came from rank r. [ranks, ...] of equal shape."""
    if group_size(group) == 1:
        return counts_RE
    counts_RE = counts_RE.contiguous()
    out = torch.empty_like(counts_RE)
    dist.all_to_all_single(out, counts_RE, group=group)
    return out
