"""Work over processes that end with their parent, however it ends; results in the order of the tasks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import TypeVar

_AHEAD = 4  # tasks a worker that are in flight, so memory does not grow
_LATEST = 0.5  # seconds until a signal is answered that came just before a wait, which it does not end
_CUT_SHORT = ("EOFError", "got end of file")  # of a connection whose other end was closed amid a message

T = TypeVar("T")
R = TypeVar("R")


def map_in_order(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[R, None, None]:
    """``map``, by ``workers`` processes; by this one where that is 1 or less. Process ``i % workers`` gets task ``i``
    and can prepare its next ones."""
    if workers <= 1:
        yield from map(function, tasks)
        return
    others, context = set(multiprocessing.active_children()), multiprocessing.get_context("spawn")
    end, mine = context.Pipe(duplex=False)  # nothing is sent: a worker ends where ``mine`` does
    pools = [ProcessPoolExecutor(1, context, initializer=_live_with, initargs=(end,)) for _ in range(workers)]
    waiting: deque[Future[R]] = deque()
    try:
        for number, task in enumerate(tasks):
            with _signals_blocked():
                waiting.append(_submit(pools[number % workers], function, task))
            if len(waiting) > _AHEAD * workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
        for pool in pools:
            pool.shutdown()
    except BrokenProcessPool as broken:
        reason = str(broken.__cause__ or _CUT_SHORT[0])
        if not any(text in reason for text in _CUT_SHORT):
            raise  # e.g. an exception whose class cannot be made again from its message
        raise ValueError(
            "a worker process was killed (memory that runs out is the usual reason); run the command again, which "
            "resumes, with fewer --workers"
        ) from None
    finally:
        mine.close()
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # what it still does, or begins, is not wanted
        for pool in pools:
            pool.shutdown(cancel_futures=True)
        end.close()


def _submit(pool: ProcessPoolExecutor, function: Callable[[T], R], task: T) -> Future[R]:
    future = pool.submit(function, task)
    # With this process's copy open, the executor would wait for ever for the rest of a long result whose worker was
    # killed while it wrote it. It is private: a Python that has another one works, but for that.
    writer = getattr(getattr(pool, "_result_queue", None), "_writer", None)
    if writer is not None:
        writer.close()
    return future


def _result(future: Future[R]) -> R:
    while not wait([future], _LATEST).done:
        pass
    return future.result()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A worker that is started here never gets the signals of Ctrl-C and of schedulers, which are for its parent."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _live_with(parent: Connection) -> None:
    """End this process as soon as its parent has ended, however it did, or wants no more."""
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Connection) -> None:
    parent.poll(None)
    os._exit(1)
