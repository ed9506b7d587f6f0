"""Independent pieces of work over the CPU threads that torch may use.

A product of few rows gains nothing from a second thread (measured: 64 rows at 94 GFLOP/s on one
thread and on two, 128 rows at 96 and 178), so small experts run side by side, a thread each, and
large ones one after another on all threads. On a GPU, work is queued one after another; so it is
under a dispatch mode (a counter of operations, selective checkpointing), which sees one thread alone.
"""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ROWS_FOR_ALL_THREADS = 96  # a thread; an expert with more gives each of them enough to do


def side_by_side(work: Callable[[int], None], rows: Sequence[int], device: torch.device) -> None:
    """``work(i)`` for every i, in any order; ``rows[i]`` says how large it is. An error in one is
    raised here, after the others have ended."""
    threads = 1 if device.type != "cpu" or is_in_torch_dispatch_mode() else torch.get_num_threads()
    small = [i for i, n in enumerate(rows) if n < ROWS_FOR_ALL_THREADS * threads]
    if threads == 1 or len(small) < 2 * threads:
        for i in range(len(rows)):
            work(i)
        return
    alone = set(small)
    for i in range(len(rows)):
        if i not in alone:
            work(i)
    _spread(work, sorted(small, key=lambda i: -rows[i]), threads)


def _spread(work: Callable[[int], None], items: list[int], threads: int) -> None:
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for item in items:
        todo.put(item)
    no_grad = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad  # both by thread

    def drain() -> None:
        torch.set_num_threads(1)  # of this thread; the others are at work too
        with no_grad(), contextlib.suppress(queue.Empty):
            while True:
                work(todo.get_nowait())

    try:
        with ThreadPoolExecutor(threads - 1) as pool:
            helpers = [pool.submit(drain) for _ in range(threads - 1)]
            drain()
        for helper in helpers:
            helper.result()
    finally:
        torch.set_num_threads(threads)
