"""Items read ahead by worker processes. One that dies or hangs is replaced, and what it had not done is done again.

torch's DataLoader is not used: its workers share one queue, whose lock dies with its holder, and its
SIGCHLD handler raises in whatever the main thread is doing, such as the middle of an optimizer step.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import util
from typing import Generic, TypeVar

from mmmoe_pretrain.data.workers.dispatch import Dispatcher
from mmmoe_pretrain.data.workers.worker import KILL_SECONDS, Failed, Fork, Source, Worker, kind_of
from mmmoe_pretrain.exit_codes import Restartable

logger = logging.getLogger(__name__)
_AT_EXIT = 10  # before multiprocessing joins its children: it would wait for these workers forever
RESTARTS_WITHIN = 3600.0  # seconds: what kills one worker a day ends no run, and what kills each at once does
_SHARE_AT_END = 0.05  # of the patience for a step, at which all busy workers count as hung

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """The number of worker processes, and their limits."""

    count: int  # 0: read in this process
    ahead: int = 4  # items made ahead of the next one
    ahead_bytes: int = 1 << 30  # that what is ready may take before further items are begun
    timeout: float = 150.0  # seconds of waiting without an answer of a worker, after which it counts as hung
    max_restarts: int = 3  # within RESTARTS_WITHIN
    together: int = 1  # items that are awaited one after the other (a step's)
    patience: float = math.inf  # seconds that waiting for those may take in all, replacements included


def more_than_cores(count: int, dp_size: int) -> str | None:
    """A warning where the workers of the ranks of this machine that load, ``count`` each, are more than its cores."""
    local, world = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))  # of torchrun
    ranks = max(1, local * dp_size // world)
    cores = min(os.cpu_count() or 1, ranks * len(os.sched_getaffinity(0)))  # each rank may be bound to its own
    if count * ranks <= cores or count <= max(1, cores // ranks):
        return None
    return (
        f"data.num_workers {count}: the {count * ranks} data workers of this machine ({ranks} of its ranks load) are "
        f"more than its cores ({cores}), which loads no faster and takes memory; use {max(1, cores // ranks)}"
    )


class WorkerDied(Restartable):
    """Data workers died or hung more often than allowed within RESTARTS_WITHIN."""


class ReadAhead(Generic[T]):
    """The items of ``source`` at ``numbers``, in this order.

    What ``source`` raises ends the iteration: a ValueError or Restartable as such, else a RuntimeError. The
    workers start with the first item and end with the last one, with ``close``, with this object,
    or within a second of this process, however it ends. They are forked by the thread that iterates. What they send
    is unpickled by another one, and goes through ``finish`` there.
    """

    def __init__(
        self,
        source: Source[T],
        numbers: range,
        workers: Workers,
        finish: Callable[[T], T] = lambda item: item,
        fork: Fork | None = None,
    ) -> None:
        """``fork``: see ``Worker``; what it makes has the same items."""
        self._source, self._numbers, self._settings = source, numbers, workers
        self._finish, self._forks = finish, fork
        self._done = 0  # items delivered: all that there is to resume from
        self._patience = workers.patience  # what is left of it
        self._running: list[Dispatcher] = []  # at most one
        self.restarts = 0  # in all
        self._latest: deque[float] = deque()  # when those within RESTARTS_WITHIN were
        self.transfer_seconds = 0.0  # of all items, through shared memory
        util.Finalize(self, _end, (self._running,), exitpriority=_AT_EXIT)

    def __iter__(self) -> ReadAhead[T]:
        return self

    def __next__(self) -> T:
        if self._done >= len(self._numbers):
            self.close()
            raise StopIteration
        if self._done % self._settings.together == 0:
            self._patience = self._settings.patience
        item = self._receive() if self._settings.count else self._read_here(self._numbers[self._done])
        self._done += 1
        return item

    def close(self) -> None:
        """End the workers at once, and the iteration."""
        self._numbers = self._numbers[: self._done]
        _end(self._running)

    def seek(self, source: Source[T], numbers: range) -> None:
        """Continue with other items; what was read ahead is dropped."""
        _end(self._running)
        self._source, self._numbers, self._done = source, numbers, 0

    def is_ready(self, items: int) -> bool:
        """Whether the next ``items`` are there, so that nothing waits for them; never without workers."""
        if not self._running:
            return False
        dispatcher, last = self._running[0], self._done + items
        with dispatcher.changed:
            return all(map(dispatcher.is_ready, range(self._done, min(last, len(self._numbers)))))

    @property
    def pids(self) -> list[int]:
        """The processes of the workers that run now."""
        workers = self._running[0].workers if self._running else []
        return [worker.process.pid for worker in workers if worker.process.pid]

    def _read_here(self, number: int) -> T:
        try:
            samples = self._source.samples(number, range(self._source.count(number)))
            return self._finish(self._source.pack(number, list(samples)))
        except ValueError as error:  # of the same kind, and so with the same exit code, as of a worker
            self.close()
            raise kind_of(error)(str(error)) from error

    def _receive(self) -> T:
        try:
            if not self._running:
                self._start()
            dispatcher = self._running[0]
            self._wait(dispatcher)
            found = dispatcher.take(self._done)
        except BaseException:  # e.g. a signal's handler raised in the middle of a change
            _end(self._running)
            raise
        if isinstance(found, Failed):
            self.close()
            failed = "a data worker failed: " if found.kind is RuntimeError else ""
            raise found.kind(f"{failed}{found.text}")
        item, seconds = found
        self.transfer_seconds += seconds
        return item

    def _start(self) -> None:
        settings = self._settings
        self._source.describe(self._numbers[self._done], 0)  # before the forks, which share what it computes
        dispatcher = Dispatcher(
            self._source, self._numbers, self._done, settings.count, settings.ahead, settings.ahead_bytes,
            settings.together, self._finish,
        )  # fmt: skip
        self._running.append(dispatcher)
        for slot in range(settings.count):
            dispatcher.set_worker(slot, self._fork(dispatcher, self._patience))

    def _fork(self, dispatcher: Dispatcher, seconds: float) -> Worker:
        return Worker(self._source, dispatcher.arenas, dispatcher.workers, self._forks, seconds)

    def _wait(self, dispatcher: Dispatcher) -> None:
        """Until the next item is there.

        A wait takes at most half of the patience that is left, so that however many workers hang, all waits together
        stay below it.
        """
        while True:
            began = time.monotonic()
            limit = min(self._settings.timeout, self._patience / 2)
            try:
                with dispatcher.changed:
                    dispatcher.changed.wait_for(
                        lambda: dispatcher.is_ready(self._done) or dispatcher.broken or _lost(dispatcher),
                        None if limit == math.inf else limit,
                    )
                    ready, lost = dispatcher.is_ready(self._done), _lost(dispatcher)
                if dispatcher.broken:
                    raise RuntimeError(f"the dispatch of data failed: {dispatcher.broken}")
                for slot in lost:
                    self._replace(dispatcher, slot, "")
                if ready:
                    return
                if not lost:
                    self._replace_hung(dispatcher, began, limit)
            finally:
                self._patience = max(0.0, self._patience - (time.monotonic() - began))

    def _replace_hung(self, dispatcher: Dispatcher, began: float, limit: float) -> None:
        """After a wait of ``limit`` seconds: the busy workers that gave no answer in it."""
        now = time.monotonic()
        impatient = self._patience - (now - began) < _SHARE_AT_END * self._settings.patience
        with dispatcher.changed:
            hung = [
                slot for slot, worker in enumerate(dispatcher.workers)
                if worker.tasks and (impatient or max(worker.since, began) <= now - 0.99 * limit)
            ]  # fmt: skip
        for slot in hung:
            pid = dispatcher.workers[slot].process.pid
            self._replace(dispatcher, slot, f"(process {pid}) hung, {limit:.3g} s without an answer,")

    def _replace(self, dispatcher: Dispatcher, slot: int, reason: str) -> None:
        worker, seconds = dispatcher.workers[slot], min(KILL_SECONDS, self._patience / 8)
        how, at = reason or worker.how_it_died(seconds), worker.at
        dispatcher.lose(worker)
        worker.end(seconds)
        self.restarts += 1
        self._latest.append(now := time.monotonic())
        while self._latest[0] < now - RESTARTS_WITHIN:
            self._latest.popleft()
        what = f"a data worker {how} {'between two samples' if at is None else f'at {self._source.describe(*at)}'}"
        if len(self._latest) > self._settings.max_restarts:
            self.close()
            raise WorkerDied(
                f"{what}; {len(self._latest)} died on this rank within an hour, and faults.max_worker_restarts is "
                f"{self._settings.max_restarts}. Where they were killed, memory ran out as a rule: lower "
                f"data.num_workers, data.prefetch or data.prefetch_bytes. Where they hung, the disk of data.train "
                f"does not answer, or a sample takes longer than data.worker_timeout and faults.hang_minutes allow. "
                f"Where it is the same sample each time, it crashes a decoder: leave it out. Then start the run again"
            )
        other = self._fork(dispatcher, self._patience / 4)
        logger.warning(
            "%s; started again (%d of %d within an hour)", what, len(self._latest), self._settings.max_restarts
        )
        dispatcher.set_worker(slot, other)


def _lost(dispatcher: Dispatcher) -> Sequence[int]:
    return [slot for slot, worker in enumerate(dispatcher.workers) if worker.lost]


def _end(running: list[Dispatcher]) -> None:
    while running:
        running.pop().end()
