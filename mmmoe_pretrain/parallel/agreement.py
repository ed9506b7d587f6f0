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
import xxhash

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
    mine, answer = _combined(group, action, combine)
    return _receive(group, answer, mine)


def exchange_each(group: Group, action: Callable[[], T], combine: Callable[[list[T]], Sequence[R]]) -> R:
    """As ``exchange``, but rank r gets entry r of what ``combine`` returns, and no other one. For entries of about
    equal length: every message of a scatter is as long as the longest."""
    if group is None:
        return from_rank_0(None, lambda: combine([action()])[0])
    mine, answer = _combined(group, action, combine)
    answers = [answer] * dist.get_world_size(group) if isinstance(answer, _Failure) else answer
    received: list[Any] = [None]
    _meet(group)
    dist.scatter_object_list(received, answers, group=group, group_src=0)
    return _result(received[0], mine)


def exchange_distinct(group: Group, action: Callable[[], T], combine: Callable[[list[T], list[int]], R]) -> R:
    """As ``exchange``, for results that many ranks have alike: each different one is sent once. ``combine`` gets the
    different results, and for each rank the number of its own among them. Equal ones are those of equal ``repr``."""
    kept: list[T] = []
    which: list[int] = []

    def digest() -> bytes:
        kept.append(action())
        return xxhash.xxh3_128_digest(repr(kept[0]).encode())

    def first_of_each(digests: list[bytes]) -> list[int]:
        firsts: dict[bytes, int] = {}
        for rank, each in enumerate(digests):
            firsts.setdefault(each, rank)
        numbers = {each: number for number, each in enumerate(firsts)}
        which.extend(numbers[each] for each in digests)
        return list(firsts.values())

    senders = exchange(group, digest, first_of_each)
    different = kept
    if group is not None and dist.get_rank(group) == 0:
        different = [kept[0], *(_received_from(group, rank) for rank in senders[1:])]
    elif group is not None and dist.get_rank(group) in senders:  # a gather's messages are all as long as the longest
        dist.send_object_list(kept, group=group, group_dst=0)
    return from_rank_0(group, lambda: combine(different, which))


def _received_from(group: dist.ProcessGroup, rank: int) -> Any:
    received = [None]
    dist.recv_object_list(received, group=group, group_src=rank)
    return received[0]


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


def _combined(
    group: dist.ProcessGroup, action: Callable[[], T], combine: Callable[[list[T]], Any]
) -> tuple[Exception | None, Any]:
    """This rank's error, and on rank 0 what ``combine`` makes of all ranks' results, or the first _Failure."""
    mine, result = _attempt(group, action)
    results: list[Any] | None = [None] * dist.get_world_size(group) if dist.get_rank(group) == 0 else None
    _meet(group)
    dist.gather_object(result, results, group=group, group_dst=0)
    if results is None:
        return mine, None
    failure = next((failure for failure in results if isinstance(failure, _Failure)), None)
    return (mine, failure) if failure else _attempt(group, lambda: combine(results))


def _receive(group: Group, answer: Any, mine: Exception | None) -> Any:
    """Rank 0's ``answer``, or its error from that of this rank."""
    if group is not None:
        received = [answer]
        _meet(group)
        dist.broadcast_object_list(received, group=group, group_src=0)
        answer = received[0]
    return _result(answer, mine)


def _result(answer: Any, mine: Exception | None) -> Any:
    """``answer``, or its error from that of this rank."""
    if isinstance(answer, _Failure):
        raise answer.kind(answer.message) from mine
    return answer


def _meet(group: dist.ProcessGroup) -> None:
    """Wait until every rank is here. Long waits use Python's sleep: a thread of a save that wakes inside torch while
    its process ends, because a peer died, turns the exit status into an abort (up to Python 3.13)."""
    _check_on_host(group)
    arrived, pause = dist.barrier(group=group, async_op=True), 1e-4
    while not arrived.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    arrived.wait()


def _check_on_host(group: dist.ProcessGroup) -> None:
    """Objects through NCCL would be copied to the device and back, with waits of the host."""
    assert dist.get_backend(group) == "gloo", f"objects go through gloo, not {dist.get_backend(group)}"


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
    _check_on_host(group)
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
