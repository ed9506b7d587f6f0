"""Small values and errors that ranks share: from rank 0, of any rank, gathered, or summed.

Every function is collective and takes a group on the host (gloo); a group of None is one process. An error on one
rank is raised on all, so that no rank waits for the others. Tensors of the model go through ``collectives.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmmoe_pretrain.parallel.groups import Group

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Failure:
    """An error that a rank can send to the others."""

    kind: type[Exception]
    message: str


def from_rank_0(group: Group, action: Callable[[], T]) -> T:
    """The result of ``action()`` on rank 0, on every rank. For what is read from disks and the environment, which
    may look different to each rank.

    An error of ``action`` is raised on every rank: a ValueError or OSError as the same class where this package
    defines it, else as ValueError; any other as RuntimeError.
    """
    mine, answer = _attempt(group, action) if group is None or dist.get_rank(group) == 0 else (None, None)
    return _receive(group, answer, mine)


def exchange(group: Group, action: Callable[[], T], combine: Callable[[list[T]], R]) -> R:
    """``combine(results)`` of rank 0, on every rank, where ``results`` are those of ``action()`` on all ranks in rank
    order. Errors as in ``from_rank_0``; of several ranks' the first one's."""
    if group is None:
        return from_rank_0(None, lambda: combine([action()]))
    mine, result = _attempt(group, action)
    results: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    _meet(group)
    dist.gather_object(result, results, group=group, group_dst=0)
    answer = None
    if results is not None:
        answer = next((failure for failure in results if isinstance(failure, _Failure)), None)
        if answer is None:
            mine, answer = _attempt(group, lambda: combine(results))
    return _receive(group, answer, mine)


def agree(group: Group, action: Callable[[], T]) -> T:
    """``action()`` on every rank, each of which keeps its own result. Errors as in ``exchange``."""
    kept: list[T] = []
    exchange(group, lambda: kept.append(action()), lambda ranks: None)
    return kept[0]


def _attempt(group: Group, action: Callable[[], Any]) -> tuple[Exception | None, Any]:
    """The error of ``action``, if it has one, and its result or _Failure."""
    try:
        return None, action()
    except (ValueError, OSError) as error:
        own = (kind for kind in type(error).__mro__ if kind.__module__.startswith("mmmoe_pretrain."))
        return error, _Failure(next(own, ValueError), str(error))
    except Exception as error:
        if group is None:
            raise
        return error, _Failure(RuntimeError, f"rank {dist.get_rank(group)}: {type(error).__name__}: {error}")


def _receive(group: Group, answer: Any, mine: Exception | None) -> Any:
    """Rank 0's ``answer``, or its error from that of this rank."""
    if group is not None:
        received = [answer]
        _meet(group)
        dist.broadcast_object_list(received, group=group, group_src=0)
        answer = received[0]
    if isinstance(answer, _Failure):
        raise answer.kind(answer.message) from mine
    return answer


def _meet(group: dist.ProcessGroup) -> None:
    """Wait until every rank is here. Long waits use Python's sleep: a thread of a save that wakes inside torch while
    its process ends, because a peer died, turns the exit status into an abort (up to Python 3.13)."""
    arrived, pause = dist.barrier(group=group, async_op=True), 1e-4
    while not arrived.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    arrived.wait()


def number_from_rank_0(group: Group, number: float) -> float:
    """Rank 0's number, bit by bit, on every rank. Cheaper than ``from_rank_0``."""
    if group is None:
        return number
    shared = torch.tensor(number, dtype=torch.float64)
    dist.broadcast(shared, group=group, group_src=0)
    return shared.item()


def largest(group: Group, numbers: Sequence[float]) -> list[float]:
    """Each of ``numbers`` on the rank where it is largest."""
    if group is None:
        return list(numbers)
    found = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return found.tolist()


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
