"""Writing, finding and reading checkpoints of a run.

A checkpoint is a folder ``step_00000100`` under ``RUN/checkpoints``: the tensors by
torch.distributed.checkpoint under ``model/NAME`` and ``optimizer/NAME/exp_avg(_sq)`` in their
full logical shape, as boxes that the ranks held (planner.py), and ``meta.json``. It is written under
``.tmp``, renamed when it is whole, and only then does the file ``latest`` name it; a killed writer
leaves the one before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mmmoe_pretrain.checkpoint.planner import LogicalLoadPlanner, LogicalSavePlanner, LogicalTensor
from mmmoe_pretrain.checkpoint.sharded import ShardedState
from mmmoe_pretrain.checkpoint.state import ParameterState

FOLDER = "checkpoints"
LATEST = "latest"
STEP = re.compile(r"step_(\d{8})")


def save(run_dir: Path, step: int, state: ShardedState, meta: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of ``step`` from all ranks and keep the last ``keep`` of them.

    Raises ValueError on every rank, and writes nothing, where the pieces of all ranks do not make up each
    tensor that one of them names; what several ranks hold must be cut alike and is written once.
    """
    root = run_dir / FOLDER
    final, draft = root / f"step_{step:08d}", root / f"step_{step:08d}.tmp"
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(draft, ignore_errors=True)
    dist.barrier()
    _write(draft, _tensors(state))
    if dist.get_rank() == 0:
        _commit(draft, final, {"step": step, **meta})
        for old in _complete(root)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def find_latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    root = run_dir / FOLDER
    pointer = root / LATEST
    if pointer.is_file():
        named = root / pointer.read_text(encoding="utf-8").strip()
        if _is_complete(named):
            return named
    complete = _complete(root)
    return complete[-1] if complete else None


def read_meta(checkpoint: Path) -> dict[str, Any]:
    """The facts saved beside the tensors; ``step`` among them."""
    return json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))


def load(checkpoint: Path, like: ShardedState) -> ShardedState:
    """The numbers of ``checkpoint`` for the pieces that ``like`` has, in tensors of their own.

    Called on all ranks, each with the names and pieces that it holds. Raises ValueError on every rank where
    the names of all ranks together, or a shape, are not the checkpoint's.
    """
    state = {name: parameter.empty_like() for name, parameter in like.items()}
    _read(checkpoint, _tensors(state), exactly=True)
    return state


def load_weights(checkpoint: Path, weights: dict[str, Tensor]) -> None:
    """Fill full tensors in place, by logical name, in a process without a process group."""
    tensors = {f"model/{name}": LogicalTensor.whole(tensor) for name, tensor in weights.items()}
    _read(checkpoint, tensors, exactly=False, alone=True)


def read_state(checkpoint: Path) -> dict[str, ParameterState]:
    """Everything that a checkpoint holds, in full, in a process without a process group."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(item.size, dtype=item.properties.dtype)
        for key, item in stored.items()
        if isinstance(item, TensorStorageMetadata)
    }
    _read(checkpoint, {key: LogicalTensor.whole(t) for key, t in tensors.items()}, exactly=True, alone=True)
    names = [key.removeprefix("model/") for key in tensors if key.startswith("model/")]
    return {
        name: ParameterState(
            tensors[f"model/{name}"],
            tensors.get(f"optimizer/{name}/exp_avg"),
            tensors.get(f"optimizer/{name}/exp_avg_sq"),
        )
        for name in names
    }


def write_state(run_dir: Path, step: int, state: dict[str, ParameterState], meta: dict[str, Any]) -> Path:
    """``save`` of full tensors from a process without a process group."""
    root = run_dir / FOLDER
    final, draft = root / f"step_{step:08d}", root / f"step_{step:08d}.tmp"
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(draft, ignore_errors=True)
    named = {key: t for name, parameter in state.items() for key, t in parameter.tensors(name).items()}
    _write(draft, {key: LogicalTensor.whole(t) for key, t in named.items()}, alone=True)
    _commit(draft, final, {**meta, "step": step})
    return final


def _tensors(state: ShardedState) -> dict[str, LogicalTensor]:
    return {
        key: LogicalTensor(parameter.shape, pieces)
        for name, parameter in state.items()
        for key, pieces in parameter.named(name).items()
    }


def _write(draft: Path, tensors: dict[str, LogicalTensor], alone: bool = False) -> None:
    with _plain_errors():
        dcp.save(tensors, checkpoint_id=draft, planner=LogicalSavePlanner(), no_dist=alone)


def _read(checkpoint: Path, tensors: dict[str, LogicalTensor], exactly: bool, alone: bool = False) -> None:
    with _plain_errors():
        dcp.load(tensors, checkpoint_id=checkpoint, planner=LogicalLoadPlanner(checkpoint, exactly), no_dist=alone)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a rank raised, on every rank, in place of torch's wrapping of it, which is no Exception; and
    without torch's remarks that a process group is missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no_dist.*|.*single process.*")
        try:
            yield
        except CheckpointException as error:
            first, _ = error.failures[min(error.failures)]
            raise first from error


def _commit(draft: Path, final: Path, meta: dict[str, Any]) -> None:
    """Make a written draft the newest checkpoint."""
    (draft / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    if final.exists():  # of a run that went on from an earlier checkpoint
        shutil.rmtree(final)
    os.replace(draft, final)
    _point_latest(final.parent, final.name)


def _point_latest(root: Path, name: str) -> None:
    draft = root / f"{LATEST}.tmp"
    draft.write_text(name + "\n", encoding="utf-8")
    os.replace(draft, root / LATEST)


def _complete(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("step_*") if STEP.fullmatch(path.name) and _is_complete(path))


def _is_complete(path: Path) -> bool:
    return (path / "meta.json").is_file() and (path / ".metadata").is_file()
