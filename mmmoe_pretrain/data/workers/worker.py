"""A data worker: a forked process that makes samples, and packs them in a second thread, as the rank tells it.

Messages are datagrams of a socket pair (SOCK_SEQPACKET): whole or not there at all, whenever a process is killed. No
lock and no queue is shared, so that a worker that is killed affects no other. Values go through an ``Arena``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import mmap
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch

from mmmoe_pretrain.data.workers.arena import Slots
from mmmoe_pretrain.exit_codes import Restartable

_AT = struct.Struct("<qq")  # the item and the sample that a worker makes, shared with it
_PACKS = struct.Struct("<q")  # behind it: the item that it packs
_SHARED = _AT.size + _PACKS.size
_NONE = -1
_PARENT_CHECK_SECONDS = 0.2  # an orphan holds its rank's sockets open: the other ranks would wait for it
KILL_SECONDS = 5.0  # a killed process may be stuck in the kernel, on a dead network disk: it is left there
_MAX_MESSAGE = 1 << 18  # Linux sends 208 KiB at most
_MAX_TEXT = 30_000  # letters of an error

T_co = TypeVar("T_co", covariant=True)


class Source(Protocol[T_co]):
    """Items by number, each packed from samples. Everything is a pure function of its arguments: it is done again if
    the worker that did it dies."""

    def count(self, k: int) -> int:
        """The number of samples of item ``k``."""

    def samples(self, k: int, which: Sequence[int]) -> Iterator[Any]:
        """Samples ``which`` of item ``k``, one after the other."""

    def pack(self, k: int, samples: list[Any]) -> T_co:
        """Item ``k``, of all its samples."""

    def pins(self, k: int) -> Sequence[int | None]:
        """Of each sample of item ``k``: None if any worker may make it; those of one number are made by one worker,
        in order."""

    def describe(self, k: int, sample: int | None) -> str:
        """A sample of item ``k``, or its packing, for an error."""


@dataclass(frozen=True)
class Make:
    """Make ``samples`` of item ``number`` and put them into ``slot`` of the samples' arena."""

    number: int
    samples: tuple[int, ...]
    slot: int


@dataclass(frozen=True)
class Pack:
    """Pack item ``number`` of its ``parts`` (samples, slot, length) into ``slot`` of the items' arena."""

    number: int
    parts: tuple[tuple[tuple[int, ...], int, int], ...]
    slot: int


@dataclass(frozen=True)
class Done:
    """``length`` bytes were written, after ``seconds`` of work; ``transfer``: seconds of reading and writing
    shared memory."""

    length: int
    seconds: float
    transfer: float


@dataclass(frozen=True)
class Failed:
    """``kind``: ValueError (what a user can mend), Restartable, or RuntimeError, whose ``text`` is a traceback."""

    text: str
    kind: type[Exception]


def kind_of(error: ValueError) -> type[ValueError]:
    """As what an error of a source ends the run: Restartable, or what another start would find again."""
    return Restartable if isinstance(error, Restartable) else ValueError


class Process(Protocol):
    """What is used of a ``multiprocessing.Process``."""

    @property
    def pid(self) -> int | None: ...
    @property
    def exitcode(self) -> int | None: ...
    def join(self, timeout: float) -> None: ...
    def kill(self) -> None: ...


# Descriptors of a worker's connection, of what it shares with the rank and of the arenas, and the seconds that it may
# take -> a process with them.
Fork = Callable[[Sequence[int], float], Process]


class Worker:
    """A process, as the rank sees it."""

    def __init__(
        self,
        source: Source[Any],
        arenas: tuple[int, int],
        others: Sequence[Worker],
        fork: Fork | None = None,
        seconds: float = math.inf,
    ) -> None:
        """``fork``: in place of a fork of this process, within ``seconds``; ``run_worker`` is then the process's main
        function."""
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.tasks: dict[int, Any] = {}  # those it has and has not answered, by their number, oldest first
        self.since = 0.0  # when it last answered, or got a task while it had none
        self.lost = False
        at = os.memfd_create("mmmoe worker")
        os.ftruncate(at, _SHARED)
        self._at = mmap.mmap(at, _SHARED)
        _AT.pack_into(self._at, 0, _NONE, _NONE)
        _PACKS.pack_into(self._at, _AT.size, _NONE)
        try:
            if fork is None:
                inherited = [self.socket, *(other.socket for other in others if not other.lost)]
                self.process: Process = _forked(source, arenas, theirs, self._at, inherited)
            else:
                self.process = fork((theirs.fileno(), at, *arenas), seconds)
        finally:
            theirs.close()  # so that the connection ends with the worker
            os.close(at)

    def send(self, number: int, task: Make | Pack) -> bool:
        """Whether the worker was given ``task``, whose answer will have ``number``; never waits."""
        try:
            self.socket.send(pickle.dumps((number, task), pickle.HIGHEST_PROTOCOL), socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionError):  # full, or the worker has ended, which ``receive`` finds
            return False
        return True

    def receive(self) -> tuple[int, Done | Failed] | None:
        """The next answer, with the number of its task; None where none is there. ``lost`` is set if the worker has
        ended."""
        try:
            message = self.socket.recv(_MAX_MESSAGE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            message = b""
        if not message:
            self.lost = True
            return None
        number, *answer = pickle.loads(message)
        return number, Failed(*answer) if isinstance(answer[0], str) else Done(*answer)

    @property
    def at(self) -> tuple[int, int | None] | None:
        """The item and sample that it makes, or made when it died; no sample: it packs."""
        number, sample = _AT.unpack_from(self._at)
        if number != _NONE:
            return number, sample
        (number,) = _PACKS.unpack_from(self._at, _AT.size)
        return None if number == _NONE else (number, None)

    def how_it_died(self, seconds: float) -> str:
        """Its exit code, or the signal that ended it; waits at most ``seconds`` for it."""
        self.process.join(seconds)  # its socket ends a moment before it does
        code = self.process.exitcode
        if code is None or code >= 0:
            return f"died (exit code {code})"
        names = {int(number): number.name for number in signal.Signals}
        return f"died ({names.get(-code, f'signal {-code}')})"

    def end(self, seconds: float = KILL_SECONDS) -> None:
        """Kill the process, and wait at most ``seconds`` for its end."""
        self.lost = True
        self.process.kill()  # it has no state to save, and may hang
        self.process.join(seconds)
        self.socket.close()


def _forked(
    source: Source[Any], arenas: tuple[int, int], theirs: socket.socket, at: mmap.mmap, inherited: list[socket.socket]
) -> Process:
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(source, arenas, theirs, at, inherited, os.getpid()), name="data worker", daemon=True
    )
    process.start()
    return process


def run_worker(source: Source[Any], descriptors: Sequence[int]) -> None:
    """In a process that ``fork`` of ``Worker`` made, with its ``descriptors``."""
    own, at, samples, packed = descriptors
    _work(source, (samples, packed), socket.socket(fileno=own), mmap.mmap(at, _SHARED), [], os.getppid())


def _work(
    source: Source[Any], arenas: tuple[int, int], own: socket.socket, at: mmap.mmap, inherited: list[socket.socket],
    parent: int,
) -> None:  # fmt: skip
    """The main function of a worker."""
    # Slurm and a terminal signal every process, but it is the rank that ends or saves, and it reads until then.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
    for other in inherited:
        other.close()
    close_sockets(own.fileno())
    gc.freeze()  # no destructor of the rank's objects runs here, and its pages stay shared
    torch.set_num_threads(1)  # the threads of a forked OpenMP pool are not there
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    makes: queue.SimpleQueue[tuple[int, Make] | None] = queue.SimpleQueue()
    slots = Slots(arenas[0]), Slots(arenas[1])
    threading.Thread(target=_pack_and_pass_on, args=(source, slots, own, at, makes), daemon=True).start()
    while (message := makes.get()) is not None:
        number, task = message
        _answer(own, number, partial(_make, source, task, slots[0], at))
        _AT.pack_into(at, 0, _NONE, _NONE)


def _pack_and_pass_on(
    source: Source[Any], slots: tuple[Slots, Slots], own: socket.socket, at: mmap.mmap,
    makes: queue.SimpleQueue[tuple[int, Make] | None],
) -> None:  # fmt: skip
    """A thread that receives tasks. It packs, which must not wait for a slow sample; the main thread makes."""
    while message := _received(own):
        number, task = pickle.loads(message)
        if isinstance(task, Make):
            makes.put((number, task))
            continue
        _PACKS.pack_into(at, _AT.size, task.number)
        _answer(own, number, partial(_pack, source, task, slots))
        _PACKS.pack_into(at, _AT.size, _NONE)
    makes.put(None)


def _received(own: socket.socket) -> bytes:
    """The next message; empty where the rank has ended."""
    try:
        return own.recv(_MAX_MESSAGE)
    except ConnectionError:
        return b""


def _answer(own: socket.socket, number: int, work: Callable[[], Done]) -> None:
    answer: Done | Failed
    try:
        answer = work()
    except ValueError as error:  # what a user can fix
        answer = Failed(str(error)[-_MAX_TEXT:], kind_of(error))
    except Exception:  # noqa: BLE001  # told to the rank, which ends with it
        answer = Failed(traceback.format_exc()[-_MAX_TEXT:], RuntimeError)
    with contextlib.suppress(OSError):  # the rank has ended
        own.send(pickle.dumps((number, *dataclasses.astuple(answer)), pickle.HIGHEST_PROTOCOL))  # names no class


def _make(source: Source[Any], task: Make, slots: Slots, at: mmap.mmap) -> Done:
    began = time.perf_counter()
    made, values = [], source.samples(task.number, task.samples)
    for sample in task.samples:
        _AT.pack_into(at, 0, task.number, sample)
        made.append(next(values))
    ended = time.perf_counter()
    length = slots.write(task.slot, made)
    return Done(length, ended - began, time.perf_counter() - ended)


def _pack(source: Source[Any], task: Pack, slots: tuple[Slots, Slots]) -> Done:
    began = time.perf_counter()
    samples: dict[int, Any] = {}
    for which, slot, length in task.parts:
        made = slots[0].load(slot, length)
        samples.update(zip(which, made, strict=True))
    loaded = time.perf_counter()
    packed = source.pack(task.number, [samples[sample] for sample in sorted(samples)])
    ended = time.perf_counter()
    length = slots[1].write(task.slot, packed)
    return Done(length, ended - loaded, loaded - began + time.perf_counter() - ended)


def close_sockets(own: int) -> None:
    """Those of the rank (not 0 to 2: a service's output may be one), so that other ranks see the rank end even if a
    worker that cannot be killed still runs."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            number = int(name)
            if number > 2 and number != own and os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                os.close(number)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(0)
