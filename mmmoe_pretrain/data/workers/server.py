"""A process that forks the data workers of a rank, so that the rank need not.

A fork has the locks of all threads as they are, and the maps and pinned pages of a GPU's driver. The server is forked
before the rank has either, opens the data by itself, and forks a worker whenever the rank asks: at the start, in the
place of a lost one, after a rollback. It ends with the rank.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import multiprocessing
import os
import pickle
import select
import signal
import socket
import struct
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import util
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from mmmoe_pretrain.data.workers.worker import close_sockets
from mmmoe_pretrain.exit_codes import Restartable

_AT_EXIT = 9  # after the workers' own, before multiprocessing waits for its children
_SIZE = struct.Struct("<q")
_STATUS = struct.Struct("<i")
_MOST_DESCRIPTORS = 16  # of a message
_PR_SET_PDEATHSIG = 1

# In the server: what ``fork`` was given -> the main function of a worker, which gets its descriptors there.
Prepare = Callable[[Any], Callable[[list[int]], None]]


class ForkedByServer:
    """A process that the server has forked; as ``multiprocessing.Process`` in what is used of it."""

    def __init__(self, pid: int, status: int) -> None:
        self.pid, self._status = pid, status
        self._code: int | None = None

    @property
    def exitcode(self) -> int | None:
        """None while it runs, and where the server has ended before it."""
        if self._status >= 0 and _readable(0, self._status):
            told = os.read(self._status, _STATUS.size)
            if told:
                (self._code,) = _STATUS.unpack(told)
            os.close(self._status)
            self._status = -1
        return self._code

    def join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.exitcode is None and self._status >= 0 and time.monotonic() < deadline:
            _readable(max(0.0, deadline - time.monotonic()), self._status)

    def kill(self) -> None:
        if self.exitcode is None and self._status >= 0:  # else the number may be another process's
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def __del__(self) -> None:
        if self._status >= 0:
            os.close(self._status)


class WorkerServer:
    """The server, as the rank sees it: ``open`` once, then ``fork`` as often as needed, then ``close``."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(theirs, os.getpid()), name="data worker server"
        )
        try:
            self._process.start()
        finally:
            theirs.close()
        self.pid = self._process.pid
        self.close = util.Finalize(self, _end, (self._socket, self._process), exitpriority=_AT_EXIT)

    def open(self, opener: Callable[..., Prepare], *args: object) -> None:
        """Let the server call ``opener(*args)``, while the rank does other things."""
        _send(self._socket, (opener, args))

    def fork(self, given: object, descriptors: Sequence[int], seconds: float = math.inf) -> ForkedByServer:
        """A worker for ``given``, with its own numbers of ``descriptors``. Raises RuntimeError with the traceback if
        the server could not open the data or prepare the worker, and Restartable if it has ended, or does not answer
        for ``seconds``, as where it is stopped."""
        told, tells = os.pipe2(os.O_CLOEXEC)
        try:
            self._socket.settimeout(None if seconds == math.inf else seconds)
            _send(self._socket, given, [*descriptors, tells])
            pid, error = pickle.loads(_received(self._socket)[0])
        except TimeoutError as silent:
            os.close(told)
            self.close()  # an answer that comes later would be taken for that of another request
            raise Restartable(
                f"the process that starts data workers (process {self.pid}) did not answer for {seconds:.3g} s: it "
                "was stopped, or the disk of data.train does not answer. Start the run again; if the disk is slow, "
                "first raise faults.hang_minutes and parallel.timeout_minutes"
            ) from silent
        except (OSError, EOFError) as ended:
            os.close(told)
            raise Restartable(
                f"the process that starts data workers has ended (exit code {self._process.exitcode}). Where it was "
                f"killed, memory ran out as a rule: lower data.num_workers, data.prefetch or data.prefetch_bytes. "
                f"Then start the run again"
            ) from ended
        finally:
            os.close(tells)
        if not pid:
            os.close(told)
            raise RuntimeError(f"the process that starts data workers could not start one: {error}")
        return ForkedByServer(pid, told)

    def __enter__(self) -> WorkerServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end(connection: socket.socket, process: Any) -> None:
    connection.close()
    process.kill()
    process.join()


def _serve(connection: socket.socket, rank: int) -> None:
    """The main function of the server."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # as in a worker
        signal.signal(name, signal.SIG_IGN)
    close_sockets(connection.fileno())
    if torch.get_num_threads() > 1:  # the call starts a thread of torch's pool in a fork
        torch.set_num_threads(1)
    wakes, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(woken)
    children: dict[BaseProcess, int] = {}  # and where its exit code is to be told
    prepare: Prepare | None = None
    failed = "it has opened nothing"
    with contextlib.suppress(EOFError, ConnectionError):  # the rank has ended, or closed it
        while os.getppid() == rank:
            if wakes in _readable(None, connection.fileno(), wakes):
                os.read(wakes, 4096)
                _tell_ends(children)
                continue
            content, descriptors = _received(connection)
            if not descriptors:
                prepare, failed = _opened(content)
                continue
            *own, tells = descriptors
            try:
                assert prepare is not None, failed
                child = _forked(
                    prepare(pickle.loads(content)),
                    own,
                    [connection.fileno(), wakes, woken, tells, *children.values()],
                )
                children[child] = tells
                _send(connection, (child.pid, ""))
            except Exception:  # noqa: BLE001  # told to the rank
                os.close(tells)
                _send(connection, (0, failed or traceback.format_exc()))
            for descriptor in own:
                os.close(descriptor)
    for child in children:
        child.kill()


def _opened(content: bytes) -> tuple[Prepare | None, str]:
    logging.disable(logging.WARNING)  # the rank, which opens the same, warns
    try:
        opener, args = pickle.loads(content)
        return opener(*args), ""
    except Exception:  # noqa: BLE001  # told to the rank
        return None, traceback.format_exc()
    finally:
        logging.disable(logging.NOTSET)


def _forked(main: Callable[[list[int]], None], own: list[int], of_server: list[int]) -> BaseProcess:
    child = multiprocessing.get_context("fork").Process(
        target=_run, args=(main, own, of_server), name="data worker", daemon=True
    )
    child.start()
    return child


def _run(main: Callable[[list[int]], None], own: list[int], of_server: list[int]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for descriptor in of_server:
        os.close(descriptor)
    main(own)


def _tell_ends(children: dict[BaseProcess, int]) -> None:
    for child in [child for child in children if child.exitcode is not None]:
        tells = children.pop(child)
        with contextlib.suppress(BrokenPipeError):  # nobody asks
            os.write(tells, _STATUS.pack(child.exitcode or 0))
        os.close(tells)


def _readable(seconds: float | None, *descriptors: int) -> list[int]:
    """Those that can be read, or whose other side has ended; waits for at most ``seconds``."""
    poll = select.poll()  # unlike select.select, it takes descriptors above 1023
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [descriptor for descriptor, _ in poll.poll(None if seconds is None else 1000 * seconds)]


def _send(connection: socket.socket, value: object, descriptors: Sequence[int] = ()) -> None:
    content = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
    header = _SIZE.pack(len(content))
    if descriptors:
        socket.send_fds(connection, [header], descriptors)
    else:
        connection.sendall(header)
    connection.sendall(content)


def _received(connection: socket.socket) -> tuple[bytes, list[int]]:
    """The next message and the descriptors that came with it. EOFError where the other side has ended."""
    header, descriptors, _, _ = socket.recv_fds(connection, _SIZE.size, _MOST_DESCRIPTORS)
    if not header:
        raise EOFError
    (size,) = _SIZE.unpack(header)
    content = bytearray()
    while len(content) < size:
        part = connection.recv(min(size - len(content), 1 << 20))
        if not part:
            raise EOFError
        content += part
    return bytes(content), list(descriptors)
