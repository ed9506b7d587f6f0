"""Ranks that are threads of one process, and a stand-in for the collectives in which they meet.

Simulated: nothing is sent. The functions of torch.distributed that ``parallel/agreement.py`` calls are replaced by
ones that hand pickled objects from thread to thread, as gloo hands them from rank to rank, and count the bytes that
rank 0 receives and sends. Messages of a gather and of a scatter are as long as the longest, as torch makes them; a
broadcast leaves rank 0 log2(ranks) times. The seconds of a rank are the CPU time of its thread, with its pickling:
not the network, and not waiting for other ranks.
"""

from __future__ import annotations

import contextlib
import gc
import math
import pickle
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from unittest import mock

import torch.distributed as dist

T = TypeVar("T")
WAIT = 900.0  # seconds for the slowest thread
STACK = 1 << 20  # bytes of a thread


class Simulated:
    """What is given as the process group of ``ranks``. Of them the first ``present`` are threads; the others are
    taken to send what the last of these sends."""

    def __init__(self, ranks: int, present: int) -> None:
        self.ranks, self.present = ranks, present
        self.received, self.sent = 0, 0  # bytes of rank 0
        self._own = threading.local()
        self._barrier = threading.Barrier(present, timeout=WAIT)
        self._slots: list[Any] = [None] * present
        self._mail = [queue.SimpleQueue[bytes]() for _ in range(present)]  # to rank 0

    @property
    def rank(self) -> int:
        """That of the calling thread."""
        return self._own.rank

    def enter(self, rank: int) -> None:
        """The calling thread is this rank."""
        self._own.rank = rank
        self._own.meeting = 0.0

    @property
    def meeting(self) -> float:
        """CPU seconds that the calling thread has spent to wake and to wait for the others."""
        return self._own.meeting

    def abort(self) -> None:
        """Wake the other threads: this one has failed."""
        self._barrier.abort()

    def gather_object(self, value: Any, found: list[Any] | None) -> None:
        """``found`` is given on rank 0."""
        messages = self._meet(pickle.dumps(value))
        if found is not None:
            messages = [*messages, *[messages[-1]] * (self.ranks - self.present)]
            self.received += (self.ranks - 1) * max(map(len, messages))
            found[:] = [pickle.loads(message) for message in messages]

    def send_object(self, values: list[Any]) -> None:
        """To rank 0."""
        self._mail[self.rank].put(pickle.dumps(values[0]))

    def receive_object(self, values: list[Any], source: int) -> None:
        """On rank 0."""
        message = self._mail[source].get(timeout=WAIT)
        self.received += len(message)
        values[0] = pickle.loads(message)

    def broadcast_object(self, values: list[Any]) -> None:
        """From rank 0."""
        message = self._meet(pickle.dumps(values[0]) if self.rank == 0 else None)[0]
        if self.rank == 0:
            self.sent += math.ceil(math.log2(self.ranks)) * len(message)
        values[0] = pickle.loads(message)

    def scatter_object(self, out: list[Any], values: Sequence[Any] | None) -> None:
        """From rank 0."""
        messages = self._meet(None if values is None else [pickle.dumps(value) for value in values])[0]
        if self.rank == 0:
            self.sent += (self.ranks - 1) * max(map(len, messages))
        out[0] = pickle.loads(messages[self.rank])

    def _meet(self, value: Any) -> list[Any]:
        """``value`` of every thread."""
        began = time.thread_time()
        self._slots[self.rank] = value
        self._barrier.wait()
        found = list(self._slots)
        self._barrier.wait()  # all have taken it
        self._own.meeting += time.thread_time() - began
        return found


class _Over:
    """A barrier that is over: what follows waits for all ranks."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


@contextlib.contextmanager
def stand_in() -> Iterator[None]:
    """Inside, the functions of torch.distributed take a ``Simulated`` as their group."""
    with mock.patch.multiple(
        dist,
        get_rank=lambda group: group.rank,
        get_world_size=lambda group: group.ranks,
        get_backend=lambda group: "gloo",
        barrier=lambda group, async_op: _Over(),
        gather_object=lambda value, found=None, group=None, group_dst=0: group.gather_object(value, found),
        send_object_list=lambda values, group=None, group_dst=0: group.send_object(values),
        recv_object_list=lambda values, group=None, group_src=0: group.receive_object(values, group_src),
        broadcast_object_list=lambda values, group=None, group_src=0: group.broadcast_object(values),
        scatter_object_list=lambda out, values=None, group=None, group_src=0: group.scatter_object(out, values),
    ):
        yield


@dataclass(frozen=True)
class Cost(Generic[T]):
    """``first``, ``others``: CPU seconds of rank 0, and of the slowest other one. ``received``, ``sent``: bytes of
    rank 0. ``results``: of the ranks that were threads."""

    first: float
    others: float
    received: int
    sent: int
    results: list[T]


def on_simulated_ranks(ranks: int, function: Callable[[int, Any], T], present: int | None = None) -> Cost[T]:
    """``function(rank, group)`` on the first ``present`` ranks (None: all). Raises what the first failing one
    raised."""
    count = min(ranks, present or ranks)
    group = Simulated(ranks, count)
    results: list[Any] = [None] * count
    seconds = [0.0] * count
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        group.enter(rank)
        began = time.thread_time()
        try:
            results[rank] = function(rank, group)
        except BaseException as error:  # noqa: BLE001 (raised below, in the main thread)
            errors.append(error)
            group.abort()
        seconds[rank] = time.thread_time() - began - group.meeting

    size = threading.stack_size(STACK)
    gc.disable()  # a rank of a job has not the objects of all ranks to go through
    try:
        with stand_in():
            threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(1, count)]
            for thread in threads:
                thread.start()
            run(0)  # here: other threads get memory from the system again and again
            for thread in threads:
                thread.join()
    finally:
        gc.enable()
        threading.stack_size(size)
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return Cost(seconds[0], max(seconds[1:], default=0.0), group.received, group.sent, results)
