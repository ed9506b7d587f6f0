"""Differentiable collectives. A group of None, or of one rank, is the identity.

The convention throughout: every rank's loss is a value whose *mean over the data-parallel
ranks* is the loss, and data-parallel reduction averages gradients. With backward passes that
sum over ranks, as here, a loss computed on every rank from reduced values then gets exactly
the gradient that one process would compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmmoe_pretrain.parallel.groups import Group
from mmmoe_pretrain.parallel.runtime import local_device


def group_size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        out = x.contiguous().clone()
        dist.all_reduce(out, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        out = grad.contiguous().clone()
        dist.all_reduce(out, group=ctx.group)
        return out, None


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
        out = grad.contiguous().clone()
        dist.all_reduce(out, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.rows
        return out[start : start + ctx.rows], None


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    out = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
    return out


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """Sum over the ranks of ``group``, differentiable."""
    return x if group_size(group) == 1 else _AllReduceSum.apply(x, group)


def gather_rows(x: Tensor, group: Group) -> Tensor:
    """[n, ...] of every rank stacked in rank order, [ranks * n, ...], differentiable.

    Every rank must bring the same n.
    """
    return x if group_size(group) == 1 else _GatherRows.apply(x, group)


def all_to_all_rows(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Send ``send[r]`` rows to rank r and receive ``receive[r]`` from it, differentiable."""
    return x if group_size(group) == 1 else _AllToAllRows.apply(x, send, receive, group)


def all_reduce_counts(counts: Sequence[float] | np.ndarray, group: Group) -> list[int]:
    """Whole numbers summed over the ranks of ``group``."""
    total = torch.tensor(np.asarray(counts), dtype=torch.int64, device=local_device())
    if group_size(group) > 1:
        dist.all_reduce(total, group=group)
    return [int(value) for value in total.tolist()]


def exchange_counts(counts_RE: Tensor, group: Group) -> Tensor:
    """Row r goes to rank r; row r of the result came from rank r. [ranks, n] -> [ranks, n]."""
    if group_size(group) == 1:
        return counts_RE
    out = torch.empty_like(counts_RE)
    dist.all_to_all_single(out, counts_RE.contiguous(), group=group)
    return out
