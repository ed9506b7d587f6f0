"""Who makes what: cuts the items to be read ahead into tasks, gives them to the workers, and collects the results.

A thread of the rank waits for answers and passes the next task on; each costs it some 200 microseconds. Another reads
what is packed out of shared memory. All state is behind one lock; the main thread forks workers and takes items.
"""

from __future__ import annotations

import heapq
import math
import os
import select
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmmoe_pretrain.data.workers import arena
from mmmoe_pretrain.data.workers.arena import Arena
from mmmoe_pretrain.data.workers.worker import Done, Failed, Make, Pack, Source, Worker

CREDIT = 2  # tasks of samples that a worker has, and of packing: the next one is there when it ends one
TASK_SECONDS = 0.05  # cheap samples go to a worker several at a time
MAX_TASKS = 512  # of an item, so that the message that packs it stays small
REST = 1.0  # seconds that a thread waits before it looks again


@dataclass(order=True)
class _Task:
    """Samples of the item ``item`` (its place in the order), or its packing."""

    item: int
    rank: int  # -1: pack; else the first sample
    samples: tuple[int, ...] = field(compare=False)
    pin: int | None = field(compare=False, default=None)
    slot: int = field(compare=False, default=-1)

    @property
    def packs(self) -> bool:
        return self.rank < 0


@dataclass
class _Item:
    waiting: int  # tasks to be done before it is packed
    parts: list[tuple[tuple[int, ...], int, int]] = field(default_factory=list)
    packed: int | None = None  # the slot
    bytes: int = 0  # in it
    value: Any = None
    loaded: bool = False
    failed: Failed | None = None
    transfer: float = 0.0

    @property
    def ready(self) -> bool:
        return self.loaded or self.failed is not None


class Dispatcher:
    """The items of ``source`` at ``numbers`` from ``first`` on, made by workers, which the owner adds and replaces.

    ``ahead`` items are made ahead of the next one; later ones than that are only begun while all that is ready takes
    less than ``most_bytes``. The next ``held`` items are unpickled, and go through ``finish``, before they are taken.
    """

    def __init__(
        self,
        source: Source[Any],
        numbers: range,
        first: int,
        count: int,
        ahead: int,
        most_bytes: int,
        held: int = 1,
        finish: Callable[[Any], Any] = lambda item: item,
    ) -> None:
        self.changed = threading.Condition()
        self.workers: list[Worker] = []
        self.broken = ""  # the traceback of the thread
        self._source, self._numbers, self._count = source, numbers, count
        self._next, self._planned, self._ahead, self._most = first, first, ahead, most_bytes
        self._held, self._finish = held, finish
        self._items: dict[int, _Item] = {}
        self._sent = 0  # tasks, by which their answers are numbered
        self._packs: list[_Task] = []  # a heap
        self._shared: list[_Task] = []  # a heap
        self._pinned: list[list[_Task]] = [[] for _ in range(count)]
        self._seconds = math.inf  # of a sample, lately; unknown at first: one sample a task
        self._samples, self._packed = Arena(most_bytes), Arena(most_bytes)
        self._left: list[tuple[Worker, Arena, int]] = []  # slots into which a lost worker may have written
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._ending = False
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"data {name}", daemon=True)
            for name, work in (("dispatch", self._collect), ("reading", self._load))
        ]

    @property
    def arenas(self) -> tuple[int, int]:
        """Descriptors of the samples' and the items' arena."""
        return self._samples.descriptor, self._packed.descriptor

    def set_worker(self, slot: int, worker: Worker) -> None:
        """Use ``worker`` in ``slot``, in the place of one that was lost; the first time, one after the other."""
        with self.changed:
            for lost in self.workers[slot : slot + 1]:
                self._recover(lost)
            self.workers[slot : slot + 1] = [worker]
            for thread in self._threads:
                if thread.ident is None:
                    thread.start()
            self._pump()
        self._wake()

    def lose(self, worker: Worker) -> None:
        """The worker is given up: others do its tasks."""
        with self.changed:
            worker.lost = True
            self._take_back(worker)
            self._pump()

    def is_ready(self, item: int) -> bool:
        """Whether ``take`` may be called; under the lock."""
        return item in self._items and self._items[item].ready

    def take(self, item: int) -> tuple[Any, float] | Failed:
        """The next item and the seconds of its transfer, or its failure; the read-ahead moves on."""
        with self.changed:
            found = self._items[item]
            if found.failed is not None:
                return found.failed
            assert found.loaded and item == self._next
            del self._items[item]
            self._next = item + 1
            self._pump()
            self.changed.notify_all()  # the next one may be read
            value, found.value = found.value, None
            return value, found.transfer

    def end(self) -> None:
        """End thread and workers at once."""
        with self.changed:
            if self._ending:
                return
            self._ending = True
            self.changed.notify_all()
        self._wake()
        for worker in self.workers:
            worker.process.kill()  # all first, then wait
        if threading.current_thread() in self._threads:
            # The garbage collector found the owner in it, perhaps under the lock, which the other one waits for.
            threading.Thread(target=self._clean_up, name="data end").start()
        else:
            self._clean_up()

    def _clean_up(self) -> None:
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()  # it waits for nothing but the lock
        for worker in self.workers:
            worker.end()
        self._samples.close()
        self._packed.close()
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _wake(self) -> None:
        os.write(self._wake_writer, b"x")

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            while not self._ending:
                work()
        except Exception:  # noqa: BLE001  # raised where the rank waits
            with self.changed:
                self.broken = traceback.format_exc()
                self.changed.notify_all()

    def _collect(self) -> None:
        """Receive answers until the set of workers changes."""
        with self.changed:
            workers = {worker.socket.fileno(): worker for worker in self.workers if not worker.lost}
        poll = select.poll()  # unlike select.select, it takes descriptors above 1023
        for descriptor in (self._wake_reader, *workers):
            poll.register(descriptor, select.POLLIN)
        while True:
            found = [descriptor for descriptor, _ in poll.poll()]
            with self.changed:
                if self._ending:  # by this thread, too, where the garbage collector finds the owner in it
                    return
                if self._wake_reader in found:
                    os.read(self._wake_reader, 4096)
                    return
                for descriptor in found:
                    self._receive(workers[descriptor])
                self._pump()
                if any(workers[descriptor].lost for descriptor in found):
                    self.changed.notify_all()
                    return

    def _load(self) -> None:
        """Read the next item that is packed, if there is one that may be held."""
        with self.changed:
            # Not for ever: where the garbage collector ends the dispatcher in this thread, it misses its own call.
            self.changed.wait_for(lambda: self._to_load() is not None or self._ending, REST)
            found = self._to_load()
            if self._ending or found is None:
                return
            assert found.packed is not None
            content = self._packed.lend(found.packed)
        found.value = self._finish(arena.load(content))
        del content  # it would keep the memory until this thread goes on
        with self.changed:
            found.loaded = True
            self.changed.notify_all()

    def _to_load(self) -> _Item | None:
        held = (self._items.get(item) for item in range(self._next, self._next + self._held))
        return next((its for its in held if its is not None and its.packed is not None and not its.loaded), None)

    def _receive(self, worker: Worker) -> None:
        received = worker.receive()
        if worker.lost:
            self._take_back(worker)
        if received is None:
            return
        number, answer = received
        task = worker.tasks.pop(number)
        worker.since = time.monotonic()
        item = self._items[task.item]
        if isinstance(answer, Failed):
            item.failed = item.failed or answer
            self.changed.notify_all()
            return
        item.transfer += answer.transfer
        (self._take_packed if task.packs else self._take_part)(item, task, answer)

    def _take_part(self, item: _Item, task: _Task, answer: Done) -> None:
        self._samples.written(task.slot, answer.length)
        item.parts.append((task.samples, task.slot, answer.length))
        item.waiting -= 1
        each = answer.seconds / len(task.samples)
        self._seconds = each if self._seconds == math.inf else 0.9 * self._seconds + 0.1 * each
        if not item.waiting:
            heapq.heappush(self._packs, _Task(task.item, -1, ()))

    def _take_packed(self, item: _Item, task: _Task, answer: Done) -> None:
        self._packed.written(task.slot, answer.length)
        item.packed, item.bytes = task.slot, answer.length
        for _, slot, _ in item.parts:
            self._samples.give_back(slot)
        self.changed.notify_all()

    def _take_back(self, worker: Worker) -> None:
        """What a lost worker has not answered is to be done again, in other slots."""
        for task in worker.tasks.values():
            self._left.append((worker, self._packed if task.packs else self._samples, task.slot))
            self._push(task)
        worker.tasks.clear()

    def _recover(self, worker: Worker) -> None:
        """The slots of what a lost worker has not answered are free, unless it is stuck in the kernel, before the end
        of a write."""
        if worker.process.exitcode is None:
            return
        for writer, slots, slot in self._left:
            if writer is worker:
                slots.recover(slot)
        self._left = [entry for entry in self._left if entry[0] is not worker]

    def _push(self, task: _Task) -> None:
        shared = self._packs if task.packs else self._shared
        heapq.heappush(shared if task.pin is None else self._pinned[task.pin % self._count], task)

    def _pump(self) -> None:
        """Plan items, and give each worker what it has room for."""
        if self._ending:
            return
        while self._planned < min(len(self._numbers), self._next + self._ahead):
            self._plan(self._planned)
            self._planned += 1
        running = [(slot, worker) for slot, worker in enumerate(self.workers) if not worker.lost]
        for room in range(CREDIT):
            for slot, worker in running:
                packs = sum(task.packs for task in worker.tasks.values())
                if packs == room and self._packs:
                    self._give(worker, self._packs)
                if len(worker.tasks) - packs <= room:
                    heaps = [heap for heap in (self._shared, self._pinned[slot]) if heap]
                    if heaps and self._may_begin(heap := min(heaps, key=lambda heap: heap[0])):
                        self._give(worker, heap)

    def _may_begin(self, heap: list[_Task]) -> bool:
        held = sum(item.bytes for item in self._items.values() if item.loaded)
        return heap[0].item == self._next or self._samples.used + self._packed.used + held < self._most

    def _give(self, worker: Worker, heap: list[_Task]) -> None:
        """Give the first task of ``heap`` to the worker, if its connection has room."""
        task = heap[0]
        number, slots = self._numbers[task.item], self._packed if task.packs else self._samples
        task.slot = slots.take()
        message: Make | Pack = Make(number, task.samples, task.slot)
        if task.packs:
            message = Pack(number, tuple(self._items[task.item].parts), task.slot)
        if not worker.send(self._sent, message):
            slots.give_back(task.slot)
            return
        heapq.heappop(heap)
        if not worker.tasks:
            worker.since = time.monotonic()
        worker.tasks[self._sent] = task
        self._sent += 1

    def _plan(self, item: int) -> None:
        number = self._numbers[item]
        by_pin: dict[int | None, list[int]] = {}
        for sample, pin in enumerate(self._source.pins(number)):
            by_pin.setdefault(pin, []).append(sample)
        most = self._samples_a_task(sum(map(len, by_pin.values())))
        tasks = [
            _Task(item, part[0], part, pin)
            for pin, samples in by_pin.items()
            for part in _cut(samples, most)
        ]  # fmt: skip
        self._items[item] = _Item(len(tasks))
        for task in tasks or [_Task(item, -1, ())]:
            self._push(task)

    def _samples_a_task(self, samples: int) -> int:
        wanted = int(TASK_SECONDS / self._seconds) if self._seconds > 0 else samples
        return max(1, -(-samples // MAX_TASKS), min(wanted, -(-samples // self._count)))


def _cut(samples: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """Parts of equal length, up to one, and of at most ``most``."""
    each = -(-len(samples) // -(-len(samples) // most))
    return [tuple(samples[start : start + each]) for start in range(0, len(samples), each)]
