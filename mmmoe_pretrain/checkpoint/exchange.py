"""Collective actions: an error on one rank is raised on all, so that no rank waits for the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from mmmoe_pretrain.checkpoint.storage import StorageError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class _Failure:
    """An error that a rank can send to the others."""

    rank: int
    kind: type[Exception]
    message: str

    @classmethod
    def of(cls, error: Exception, rank: int) -> _Failure:
        if isinstance(error, OSError):
            return cls(rank, StorageError, str(error))
        if isinstance(error, ValueError):
            return cls(rank, ValueError, str(error))
        return cls(rank, RuntimeError, f"rank {rank}: {type(error).__name__}: {error}")


def exchange(group: ProcessGroup | None, action: Callable[[], T], combine: Callable[[list[T]], list[R]]) -> R:
    """``action()`` on every rank; rank 0 makes of all results one reply a rank. One process where ``group``
    is None.

    The group must be on CPUs (gloo). Raises on every rank the error of the first rank that failed: ValueError,
    StorageError, or RuntimeError for what is neither.
    """
    if group is None:
        return combine([action()])[0]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    mine, result = _attempt(action, rank)
    results: list[Any] | None = [None] * size if rank == 0 else None
    _meet(group)
    dist.gather_object(result, results, group=group, group_dst=0)
    replies: Any = None
    if results is not None:
        reply: Any = next((r for r in results if isinstance(r, _Failure)), None)
        if reply is None:
            mine, reply = _attempt(lambda: combine(results), rank)
        replies = [reply] * size if isinstance(reply, _Failure) else reply
    received: list[Any] = [None]
    _meet(group)
    dist.scatter_object_list(received, replies, group=group, group_src=0)
    if isinstance(received[0], _Failure):
        raise received[0].kind(received[0].message) from mine
    return received[0]


def agree(group: ProcessGroup | None, action: Callable[[], T]) -> T:
    """``action()`` on every rank, each keeping its own result."""
    kept: list[T] = []
    exchange(group, lambda: kept.append(action()), lambda ranks: [None] * len(ranks))
    return kept[0]


def on_first(group: ProcessGroup | None, action: Callable[[], R]) -> R:
    """``action()`` on rank 0 alone; its result, or its error, on every rank."""
    return exchange(group, lambda: None, lambda ranks: [action()] * len(ranks))


def broadcast(group: ProcessGroup | None, action: Callable[[], bytes]) -> bytes:
    """``action()`` on rank 0 alone; its bytes, or its error, on every rank. For large replies: ``on_first`` sends one
    message per rank."""
    kept: list[bytes] = []

    def first() -> int:
        kept.append(action())
        return len(kept[0])

    length = on_first(group, first)
    if group is None or not length:
        return kept[0] if kept else b""
    buffer = (
        torch.frombuffer(bytearray(kept[0]), dtype=torch.uint8) if kept else torch.empty(length, dtype=torch.uint8)
    )
    dist.broadcast(buffer, group=group, group_src=0)
    return buffer.numpy().tobytes()


def _meet(group: ProcessGroup) -> None:
    """Wait until every rank is here. Long waits use Python's sleep: a thread of a save that wakes inside torch while
    its process ends, because a peer died, turns the exit status into an abort (up to Python 3.13)."""
    arrived, pause = dist.barrier(group=group, async_op=True), 1e-4
    while not arrived.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    arrived.wait()


def _attempt(action: Callable[[], Any], rank: int) -> tuple[Exception | None, Any]:
    try:
        return None, action()
    except Exception as error:  # noqa: BLE001 (raised again, on every rank)
        return error, _Failure.of(error, rank)
