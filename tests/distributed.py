"""Runs a function on several gloo ranks: imports once, forks, and never hangs.

A rank is a forked process of this one, so what it imports is imported once for all tests. What a
rank raises, or that it did not end in time, fails the test with the rank's traceback.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import queue
import random
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image

from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.engines import megatron as _megatron
from mmmoe_pretrain.parallel.degrees import resolve_degrees
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.mesh import build_groups

# What a run imports on its way, once and before the first fork, and not in each rank.
_megatron.prepare()
Image.init()
for _name in ("megatron.core.transformer.transformer_block", "matplotlib.figure", "matplotlib.backends.backend_agg"):
    importlib.import_module(_name)


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
    gc.freeze()  # a collection would write to, and so copy, every page that this process shares with the tests
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


def groups_of(parallel: ParallelConfig, num_experts: int | Sequence[int]) -> Groups:
    """The groups of the running process group under these degrees."""
    return build_groups(resolve_degrees(parallel, num_experts, dist.get_world_size()))


def free_port() -> int:
    """One that nobody listens on. Each worker of pytest-xdist has its own range below the ephemeral ports."""
    first = 10_000 + 5_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.SystemRandom().randrange(first, first + 5_000)
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
