"""Runs a function on several ranks that are forks of this process: libraries are imported once, before."""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
    """What ``function(*args)`` returns on rank 0; it runs on every rank with torchrun's environment.

    Raises RuntimeError where a rank fails, or after ``timeout`` seconds.
    """
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]

    def rank_main(rank: int) -> None:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(ranks),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        found = function(*args)
        if rank == 0:
            results.put(found)

    processes = [context.Process(target=rank_main, args=(rank,), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        return _first_result(results, processes, time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _first_result(results: Any, processes: list[Any], deadline: float) -> Any:
    while time.monotonic() < deadline:
        try:
            return results.get(timeout=0.2)
        except queue.Empty:
            failed = [i for i, process in enumerate(processes) if process.exitcode not in (None, 0)]
            if failed:
                raise RuntimeError(f"ranks {failed} failed; what they raised stands above") from None
    raise RuntimeError("the ranks took longer than they were given")


def over_ranks(value: float) -> float:
    """The sum over the ranks."""
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def slowest_rank(value: float) -> float:
    """The largest over the ranks."""
    slowest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return float(slowest)
