"""Runs with faults built in: each function patches the process that it runs in, a fork."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mmmoe_pretrain import cli
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint import saver, store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.loader import Loader, StepData
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.engines.megatron import MegatronEngine
from mmmoe_pretrain.train.loop import train
from tests.distributed import free_port

STEPS = 12
SHORT = {"steps": STEPS, "global_batch_size": 8, "num_microbatches": 1, "log_every": 1}


def _with_nan(batch: Batch) -> Batch:
    audio = batch.inputs["audio"]
    log_mel = torch.full_like(audio["log_mel"], torch.nan)
    return dataclasses.replace(batch, inputs={**batch.inputs, "audio": {**audio, "log_mel": log_mel}})


def on_data(change: Callable[[Loader, StepData], StepData]) -> None:
    """Apply ``change`` to every step's data before the run gets it."""
    plain = Loader.__next__
    Loader.__next__ = lambda loader: change(loader, plain(loader))  # type: ignore[method-assign]


def keep_batches(path: Path) -> None:
    """Append "step batch" of everything that rank 0 trains on."""

    def note(_: Loader, data: StepData) -> StepData:
        if dist.get_rank() == 0:
            with path.open("a", encoding="ascii") as file:
                file.write(f"{data.step} {data.batch}\n")
        return data

    on_data(note)


def poison(batches: Collection[int], rank: int = 0) -> None:
    """The audio values of these batches are not numbers on ``rank``."""

    def change(_: Loader, data: StepData) -> StepData:
        if data.batch not in batches or dist.get_rank() != rank:
            return data
        bad = [_with_nan(m) for m in data.microbatches]
        return data._replace(microbatches=bad)

    on_data(change)


def at_step(step: int, act: Callable[[Loader], Any], rank: int = 0) -> None:
    """``act`` as ``step`` (the first is 1) begins on ``rank``, once in this process."""
    done = []

    def change(loader: Loader, data: StepData) -> StepData:
        if data.step + 1 == step and dist.get_rank() == rank and not done:
            done.append(True)
            act(loader)
        return data

    on_data(change)


def on_result(change: Callable[[MegatronEngine, StepResult], StepResult]) -> None:
    plain = MegatronEngine.step

    def step(engine: MegatronEngine, *args: Any) -> StepResult:
        return change(engine, plain(engine, *args))

    MegatronEngine.step = step  # type: ignore[method-assign]


def failing_saves(of: Collection[int]) -> None:
    """Saves of these steps find the disk full, on every rank."""
    plain = saver.write_checkpoint

    def write(storage: Any, step: int, *args: Any) -> store.Checkpoint:
        if step in of:
            raise OSError(28, "No space left on device")
        return plain(storage, step, *args)

    saver.write_checkpoint = write


def killed_in_save(step: int, rank: int) -> None:
    """A rank dies while it writes this step."""
    plain = saver.write_checkpoint

    def write(storage: Any, at: int, *args: Any) -> store.Checkpoint:
        if at == step and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(storage, at, *args)

    saver.write_checkpoint = write


def codes(ranks: int, path: Path, config: RunConfig, *faults: Callable[[], None], seconds: float = 60) -> list[Any]:
    """How ``mmmoe train`` ends on forked ranks, with faults, by rank; None: not in time. ``path``: for the config."""
    run_config.dump(config, path)
    port = free_port()

    def work(rank: int) -> None:
        gc.freeze()  # as tests/distributed.py does it
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
        for fault in faults:
            fault()
        sys.argv = ["mmmoe", "train", str(path)]
        cli.main()

    forked = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(ranks)]
    deadline = time.monotonic() + seconds
    for process in forked:
        process.start()
    for process in forked:
        process.join(max(0.0, deadline - time.monotonic()))
    found = [process.exitcode for process in forked]
    for process in forked:
        process.kill()
        process.join()
    return found


def faulty(config: RunConfig, *faults: Callable[[], None]) -> int:
    """A run's training in a forked rank, with faults."""
    for fault in faults:
        fault()
    return train(config)
