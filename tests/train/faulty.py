"""Tiny runs and what they wrote, and faults built in: each of these patches the process that it runs in, a fork."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mmmoe_pretrain import cli
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import saver, store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.loader import Loader, StepData
from mmmoe_pretrain.data.workers.replica import ReplicaLoader
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.engines.megatron import MegatronEngine
from mmmoe_pretrain.train.journal import read_events
from mmmoe_pretrain.train.loop import train
from tests.distributed import free_port
from tests.support import tiny_config

STEPS = 12
SHORT = {"steps": STEPS, "global_batch_size": 8, "num_microbatches": 1, "log_every": 1}


def config_in(root: Path, tiny_data: Path, **sections: Any) -> RunConfig:
    """A run of twelve steps, saved every four, on ``tiny_data``; ``data`` and ``train`` add to their sections."""
    data = {"train": [{"path": str(tiny_data / "train")}], "tokenizer": str(tiny_data / "tokens.model"),
            "num_workers": 0}  # fmt: skip
    added = {"data": {**data, **sections.pop("data", {})}, "train": {**SHORT, **sections.pop("train", {})}}
    return tiny_config(root, **{"checkpoint": {"every": 4}, **added, **sections})


def copied(config: RunConfig, root: Path) -> RunConfig:
    """The run under ``root``, as a copy."""
    copy = config.model_copy(update={"runs_dir": str(root / "runs")})
    shutil.copytree(config.run_dir, copy.run_dir)
    return copy


def logged(config: RunConfig) -> list[dict[str, Any]]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(config: RunConfig) -> np.ndarray:
    return np.array([list(record["losses"].values()) for record in logged(config)])


def steps_of(config: RunConfig) -> list[int]:
    return [record["step"] for record in logged(config)]


def events(config: RunConfig, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(config.run_dir) if not kinds or event["event"] in kinds]


def saved(config: RunConfig) -> list[int]:
    """The steps of the checkpoints."""
    return [checkpoint.step for checkpoint in store.checkpoints(config.checkpoint_root)]


def on_data(change: Callable[[Loader, StepData], StepData]) -> None:
    """Apply ``change`` to every step's data before the run gets it."""
    for kind in (Loader, ReplicaLoader):
        kind.__next__ = lambda loader, plain=kind.__next__: change(loader, plain(loader))  # type: ignore


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
        if data.batch in batches and dist.get_rank() == rank:
            for microbatch in data.microbatches:
                microbatch.inputs["audio"]["log_mel"].fill_(torch.nan)
        return data

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


def signalled(step: int, number: int = signal.SIGTERM, rank: int = 0) -> None:
    """As ``step`` begins on ``rank``."""
    at_step(step, lambda _: os.kill(os.getpid(), number), rank)


def on_save(act: Callable[[int], None]) -> None:
    """``act`` with the step before this rank writes a checkpoint."""
    plain = saver.write_checkpoint

    def write(storage: Any, step: int, *args: Any) -> store.Checkpoint:
        act(step)
        return plain(storage, step, *args)

    saver.write_checkpoint = write


def failing_saves(of: Collection[int]) -> None:
    """Saves of these steps find the disk full, on every rank."""

    def act(step: int) -> None:
        if step in of:
            raise OSError(28, "No space left on device")

    on_save(act)


def killed_in_save(step: int, rank: int) -> None:
    """A rank dies while it writes this step."""
    on_save(lambda at: os.kill(os.getpid(), signal.SIGKILL) if (at, dist.get_rank()) == (step, rank) else None)


def codes(ranks: int, config: RunConfig, *faults: Callable[[], None]) -> list[int | None]:
    """How ``mmmoe train`` ends on forked ranks, with faults, by rank; None: not in a minute."""
    path = Path(f"{config.runs_dir}.yaml")
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
    deadline = time.monotonic() + 60.0
    for process in forked:
        process.start()
    for process in forked:
        process.join(max(0.0, deadline - time.monotonic()))
    found = [process.exitcode for process in forked]
    for process in forked:
        process.kill()
        process.join()
    return found


def faulty(config: RunConfig, *faults: Callable[[], None], **arguments: bool) -> int:
    """A run's training in a forked rank, with faults."""
    for fault in faults:
        fault()
    return train(config, **arguments)


def outcome(config: RunConfig, *faults: Callable[[], None]) -> str:
    """How it ends, in a line."""
    try:
        return f"code {faulty(config, *faults)}"
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
