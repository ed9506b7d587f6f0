"""Worker processes that prefetch items. A worker that dies or hangs is replaced and continues at the same item.
Worker w of W makes the items w, w + W, ... of a range and sends them through its own pipe, so that a worker that is
killed in the middle of a message affects no other and leaves no lock behind.

torch's DataLoader is not used: its workers share one queue, whose lock dies with its holder, and its
SIGCHLD handler raises in whatever the main thread is doing, such as the middle of an optimizer step.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import mmap
import multiprocessing
import os
import pickle
import queue
import select
import signal
import struct
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

import torch

logger = logging.getLogger(__name__)
_SIZE = struct.Struct("<Q")  # of the message that follows
_AT = struct.Struct("<q")  # the item that a worker is at, shared with it
_AT_NONE = -1
_PARENT_CHECK_SECONDS = 0.2  # an orphan holds its rank's sockets open: the other ranks would wait for it
_KILL_SECONDS = 5.0  # a killed process may be stuck in the kernel, on a dead network disk: it is left there
_AT_EXIT = 10  # before multiprocessing joins its children: it would wait for these workers forever

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Workers:
    """The number of worker processes, and their limits."""

    count: int  # 0: read in this process
    prefetch: int = 4  # items that a worker keeps ready
    timeout: float = 150.0  # seconds of waiting for an item, after which its worker counts as hung
    max_restarts: int = 3
    together: int = 1  # items that are awaited one after the other (a step's)
    patience: float = math.inf  # seconds that waiting for those may take in all, replacements included


class WorkerDied(RuntimeError):
    """Data workers died or hung more often than allowed."""


class _Lost(Exception):
    """The worker at the other end of a pipe has ended, or hangs."""


class Source(Protocol[T_co]):
    """Items by number."""

    def read(self, k: int) -> T_co:
        """Item ``k``: a pure function of k, which is read again if the worker that prefetched it dies."""

    def describe(self, k: int) -> str:
        """What item ``k`` is, for an error."""


class ReadAhead(Generic[T]):
    """The items of ``source`` at ``numbers``, in this order.

    What ``source.read`` raises ends the iteration: a ValueError as such, else a RuntimeError. The
    workers start with the first item and end with the last one, with ``close``, with this object,
    or within a second of this process, however it ends.
    """

    def __init__(self, source: Source[T], numbers: range, workers: Workers) -> None:
        self._source, self._numbers, self._settings = source, numbers, workers
        self._done = 0  # items delivered: all that there is to resume from
        self._patience = workers.patience  # what is left of it
        self._workers: list[_Worker] = []
        self.restarts = 0
        util.Finalize(self, _end_all, (self._workers,), exitpriority=_AT_EXIT)

    def __iter__(self) -> ReadAhead[T]:
        return self

    def __next__(self) -> T:
        if self._done >= len(self._numbers):
            self.close()
            raise StopIteration
        if self._done % self._settings.together == 0:
            self._patience = self._settings.patience
        number = self._numbers[self._done]
        item = self._receive() if self._settings.count else self._source.read(number)
        self._done += 1
        return item

    def close(self) -> None:
        """End the workers at once, and the iteration."""
        self._numbers = self._numbers[: self._done]
        _end_all(self._workers)

    def seek(self, source: Source[T], numbers: range) -> None:
        """Continue with other items."""
        _end_all(self._workers)
        self._source, self._numbers, self._done = source, numbers, 0

    @property
    def pids(self) -> list[int]:
        """The processes of the workers that run now."""
        return [worker.process.pid for worker in self._workers if worker.process.pid]

    def _receive(self) -> T:
        try:
            while len(self._workers) < self._settings.count:
                self._workers.append(self._start(len(self._workers)))
            kind, value = self._wait(self._done % self._settings.count)
        except BaseException:  # e.g. a signal's handler raised, and half a message is left in the pipe
            _end_all(self._workers)
            raise
        if kind == "item":
            return value
        self.close()
        raise ValueError(value) if kind == "value_error" else RuntimeError(f"a data worker failed: {value}")

    def _wait(self, slot: int) -> tuple[str, Any]:
        """The next message of the worker of ``slot``, or of its successor.

        A wait takes at most half of the patience that is left, so that however many workers hang, all waits together
        stay below it.
        """
        while True:
            began = time.monotonic()
            try:
                message = self._workers[slot].receive(min(self._settings.timeout, self._patience / 2))
                return pickle.loads(message)
            except _Lost as loss:
                self._replace(slot, str(loss))
            finally:
                self._patience = max(0.0, self._patience - (time.monotonic() - began))

    def _start(self, slot: int) -> _Worker:
        """The worker of ``slot``, beginning with its first item that is not delivered."""
        count = self._settings.count
        ahead = (slot - self._done) % count
        others = [worker.reader for i, worker in enumerate(self._workers) if i != slot]
        return _Worker(self._source, self._numbers[self._done + ahead :: count], self._settings.prefetch, others)

    def _replace(self, slot: int, reason: str) -> None:
        seconds = min(_KILL_SECONDS, self._patience / 8)
        how = reason or self._workers[slot].how_it_died(seconds)
        at = self._workers[slot].at
        self._workers[slot].end(seconds)
        self.restarts += 1
        what = f"a data worker {how} {'between two items' if at is None else f'at {self._source.describe(at)}'}"
        if self.restarts > self._settings.max_restarts:
            self.close()
            raise WorkerDied(
                f"{what}; {self.restarts} died on this rank, and faults.max_worker_restarts is "
                f"{self._settings.max_restarts}. Where they were killed, memory ran out as a rule: lower "
                f"data.num_workers or data.prefetch. Where they hung, the disk of data.train does not answer, or the "
                f"samples take longer than data.worker_timeout and faults.hang_minutes leave them. Where it is the "
                f"same samples each time, they crash a decoder: leave them out. Then start the run again"
            )
        logger.warning("%s; started again (%d of %d)", what, self.restarts, self._settings.max_restarts)
        self._workers[slot] = self._start(slot)


class _Worker:
    """A process and the reading end of its pipe."""

    def __init__(self, source: Source[Any], numbers: range, prefetch: int, others: list[int]) -> None:
        self.reader, writer = os.pipe()
        self._at = mmap.mmap(-1, _AT.size)
        _AT.pack_into(self._at, 0, _AT_NONE)
        self.process: BaseProcess = multiprocessing.get_context("fork").Process(
            target=_work,
            args=(source, numbers, prefetch, writer, self._at, [*others, self.reader], os.getpid()),
            name="data worker",
            daemon=True,
        )
        try:
            self.process.start()
        finally:
            os.close(writer)  # so that the pipe ends with the worker

    def receive(self, timeout: float) -> memoryview:
        """The next message. Raises _Lost if the worker has ended, or no message comes in ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        try:
            (size,) = _SIZE.unpack(self._exactly(_SIZE.size, deadline))
            return self._exactly(size, deadline)
        except TimeoutError:
            raise _Lost(f"(process {self.process.pid}) hung, {timeout:.3g} s without an item,") from None

    @property
    def at(self) -> int | None:
        """The item that it makes, or made when it died."""
        number = _AT.unpack_from(self._at)[0]
        return None if number == _AT_NONE else number

    def how_it_died(self, seconds: float) -> str:
        """Its exit code, or the signal that ended it; waits at most ``seconds`` for it."""
        self.process.join(seconds)  # its pipe ends a moment before it does
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"died (exit code {code})"
        names = {int(number): number.name for number in signal.Signals}
        return f"died ({names.get(-code, f'signal {-code}')})"

    def end(self, seconds: float = _KILL_SECONDS) -> None:
        """Kill the process, and wait at most ``seconds`` for its end."""
        self.process.kill()  # it has no state to save, and may hang
        self.process.join(seconds)
        reader, self.reader = self.reader, -1
        if reader >= 0:
            os.close(reader)

    def _exactly(self, size: int, deadline: float) -> memoryview:
        data = memoryview(bytearray(size))
        poll = select.poll()  # unlike select.select, it takes descriptors above 1023
        poll.register(self.reader, select.POLLIN)
        done = 0
        while done < size:
            if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            count = os.readv(self.reader, [data[done:]])
            if not count:
                raise _Lost
            done += count
        return data


def _end_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.kill()  # all first, then wait
    for worker in workers:
        worker.end()
    workers.clear()


def _work(
    source: Source[Any], numbers: range, prefetch: int, writer: int, at: mmap.mmap, inherited: list[int], parent: int
) -> None:
    """The main function of a worker: make items, at most ``prefetch`` of them unread."""
    # Slurm and a terminal signal every process, but it is the rank that ends or saves, and it reads until then.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    for descriptor in inherited:
        os.close(descriptor)
    _close_sockets()
    gc.freeze()  # no destructor of the rank's objects runs here, and its pages stay shared
    torch.set_num_threads(1)  # the threads of a forked OpenMP pool are not there
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    room, ready = threading.Semaphore(prefetch), queue.SimpleQueue[bytes | None]()
    sender = threading.Thread(target=_send, args=(ready, room, writer), daemon=True)
    sender.start()
    try:
        for number in numbers:
            room.acquire()
            _AT.pack_into(at, 0, number)
            ready.put(_message("item", source.read(number)))
            _AT.pack_into(at, 0, _AT_NONE)
    except ValueError as error:  # what a user can fix
        ready.put(_message("value_error", str(error)))
    except Exception:
        ready.put(_message("error", traceback.format_exc()))
        raise
    finally:
        ready.put(None)
        sender.join()


def _close_sockets() -> None:
    """Those of the rank (not 0 to 2: a service's output may be one), so that other ranks see the rank end even if a
    worker that cannot be killed still runs."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            if int(name) > 2 and os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.close(int(name))


def _message(kind: str, value: object) -> bytes:
    return pickle.dumps((kind, value), protocol=pickle.HIGHEST_PROTOCOL)


def _send(ready: queue.SimpleQueue[bytes | None], room: threading.Semaphore, writer: int) -> None:
    try:
        with os.fdopen(writer, "wb", buffering=0) as pipe:
            while (message := ready.get()) is not None:
                for part in (_SIZE.pack(len(message)), message):
                    view = memoryview(part)
                    while view:
                        view = view[pipe.write(view) :]
                room.release()
    except BrokenPipeError:  # the reader has ended
        os._exit(0)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(0)
