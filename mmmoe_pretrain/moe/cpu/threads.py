"""Independent pieces of work over the CPU threads that torch may use.

A product of very few rows gains little from a second thread, so experts run side by side, a thread
each, where most of the work is such (measured, two threads in bf16: 128 experts of 16 rows 93 ms
against 132 one after another; 32 of different sizes, 15 to 512 rows, 58 against 46, since the threads that
the large ones leave spinning are in the way). On a GPU, work is queued one after another; so it is under
a dispatch mode (a counter of operations, selective checkpointing), which sees only one thread.
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ROWS_FOR_ALL_THREADS = 24  # a thread; an expert with more gives each of them enough to do


def run_side_by_side(
    work: Callable[[int], None],
    rows: Sequence[int],
    device: torch.device,
    rows_for_all_threads: int = ROWS_FOR_ALL_THREADS,
) -> None:
    """``work(i)`` for every i, in any order; ``rows[i]`` says how large it is. From ``rows_for_all_threads`` a thread
    on, it gets all threads (0: always). An error in one is raised here, after the others have ended."""
    threads = 1 if device.type != "cpu" or is_in_torch_dispatch_mode() else torch.get_num_threads()
    small = [i for i, n in enumerate(rows) if n < rows_for_all_threads * threads]
    if threads == 1 or len(small) < 2 * threads or 2 * sum(rows[i] for i in small) < sum(rows):
        small = []
    for i in sorted(set(range(len(rows))) - set(small)):
        work(i)
    if small:
        _spread(work, sorted(small, key=lambda i: -rows[i]), threads)


def _spread(work: Callable[[int], None], items: list[int], threads: int) -> None:
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    no_grad = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad  # both by thread

    def drain() -> None:
        with no_grad(), contextlib.suppress(queue.Empty):
            while True:
                work(todo.get_nowait())

    drains = [_single_threads(threads, os.getpid()).submit(drain) for _ in range(threads)]
    wait(drains)
    for done in drains:
        done.result()


@functools.cache
def _single_threads(count: int, process: int) -> ThreadPoolExecutor:
    """Threads that give each operation one core. They are kept, since a new thread's first allocations are page
    faults. ``process``: threads do not survive a fork."""
    pool = ThreadPoolExecutor(count, "mmmoe-experts")
    met = threading.Barrier(count)  # so that each of them is started

    def begin() -> None:
        met.wait()
        torch.get_num_threads()  # the first call in a thread sets its number to that of the process
        torch.set_num_threads(1)  # of this thread, and of the process

    wait([pool.submit(begin) for _ in range(count)])
    torch.set_num_threads(count)
    return pool
