"""Runs a function on several gloo ranks: imports once, forks, and never hangs.

A rank is a forked process of this one, so megatron-core is imported once for all tests. What a
rank raises, or that it did not end in time, fails the test with the rank's traceback.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from mmmoe_pretrain.engines import megatron as _megatron

_megatron.prepare()  # before the first fork: the import takes seconds


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 90.0) -> list[Any]:
    """``function(*args)`` on every rank, with torchrun's environment; the results by rank.

    The function runs in a fork, so it may be a closure; what it returns must pickle.
    """
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    port = free_port()
    ranks = [context.Process(target=_rank, args=(rank, world_size, port, results, function, args))
             for rank in range(world_size)]  # fmt: skip
    for rank in ranks:
        rank.start()
    try:
        return _collect(ranks, results, time.monotonic() + timeout)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()


def _rank(rank: int, world_size: int, port: int, results: Any, function: Callable[..., Any], args: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    torch.set_num_threads(1)
    try:
        results.put((rank, True, function(*args)))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise


def _collect(ranks: list[Any], results: Any, deadline: float) -> list[Any]:
    found: dict[int, Any] = {}
    while len(found) < len(ranks):
        try:
            rank, fine, value = results.get(timeout=0.2)
        except queue.Empty:
            dead = [i for i, p in enumerate(ranks) if p.exitcode not in (None, 0) and i not in found]
            assert not dead, f"ranks {dead} died with {[ranks[i].exitcode for i in dead]} and said nothing"
            assert time.monotonic() < deadline, f"only ranks {sorted(found)} ended in time"
            continue
        assert fine, f"rank {rank} failed:\n{value}"
        found[rank] = value
    return [found[rank] for rank in sorted(found)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
