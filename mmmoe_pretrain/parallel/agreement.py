"""Small values that are equal on all ranks of a group: from rank 0, of any rank, or summed.

Every function is collective and takes a group on the host (gloo); a group of None is one process. Tensors of the
model go through ``collectives.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmmoe_pretrain.parallel.groups import Group

T = TypeVar("T")


def from_rank_0(group: Group, action: Callable[[], T]) -> T:
    """The result of ``action()`` on rank 0, on every rank. For what is read from disks and the environment, which
    may look different to each rank.

    A ValueError or OSError of ``action`` is raised on every rank: as the same class where this package defines it,
    else as ValueError.
    """
    answer: list[Any] = [None, None]  # the result, or the class and message of the error
    error: Exception | None = None
    if group is None or dist.get_rank(group) == 0:
        try:
            answer[0] = action()
        except (ValueError, OSError) as caught:
            own = (kind for kind in type(caught).__mro__ if kind.__module__.startswith("mmmoe_pretrain."))
            error, answer[1] = caught, (next(own, ValueError), str(caught))
    if group is not None:
        dist.broadcast_object_list(answer, group=group, group_src=0)
    if answer[1] is not None:
        kind, message = answer[1]
        raise kind(message) from error
    return answer[0]


def number_from_rank_0(group: Group, number: float) -> float:
    """Rank 0's number, bit by bit, on every rank. Cheaper than ``from_rank_0``."""
    if group is None:
        return number
    shared = torch.tensor(number, dtype=torch.float64)
    dist.broadcast(shared, group=group, group_src=0)
    return shared.item()


def any_rank(group: Group, condition: bool) -> bool:
    """Whether ``condition`` is true on some rank."""
    if group is None:
        return condition
    found = torch.tensor(int(condition))
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return bool(found)


def gather_objects(group: Group, value: T) -> list[T]:
    """``value`` of every rank, in rank order, on every rank. Pickled: for small and rare messages."""
    if group is None:
        return [value]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


class BackgroundSum:
    """Sums of a few numbers over all ranks, reduced while other work runs: ``start``, then ``wait``."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._sums: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def start(self, numbers: Sequence[float]) -> None:
        assert self._sums is None, "start without the wait of the sum before"
        self._sums = torch.tensor(numbers, dtype=torch.float64)
        if self._group is not None:
            self._work = dist.all_reduce(self._sums, group=self._group, async_op=True)

    def wait(self) -> list[float]:
        assert self._sums is not None, "wait without start"
        if self._work is not None:
            self._work.wait()
        sums, self._sums, self._work = self._sums, None, None
        return sums.tolist()
