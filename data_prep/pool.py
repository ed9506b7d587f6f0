"""Work over processes that end with their parent, however it ends; results in the order of the tasks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

_AHEAD = 4  # tasks a worker that are in flight, so memory does not grow
_PARENT_CHECK_SECONDS = 0.2

T = TypeVar("T")
R = TypeVar("R")


def map_in_order(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[R, None, None]:
    """``map``, by ``workers`` processes; by this one where that is 1 or less."""
    if workers <= 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_live_with, initargs=(os.getpid(),)
    )
    waiting: deque[Future[R]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, task))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed (memory that runs out is the usual reason); run the command again, which "
            "resumes, with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _live_with(parent: int) -> None:
    """End this process as soon as ``parent`` has ended, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_CHECK_SECONDS)
    os._exit(1)
