"""Writing, finding and reading the checkpoints under a root, which is a path or any fsspec URL.

A checkpoint is a folder (names.py) of safetensors files with the tensors ``model/NAME`` and
``optimizer/NAME/exp_avg(_sq)`` in their full logical shape, as the boxes that ranks held. It is complete
when its manifest stands and every file has the size that the manifest says.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException

from mmmoe_pretrain.checkpoint.exchange import agree, broadcast, exchange, on_first
from mmmoe_pretrain.checkpoint.files import FileRecord, digest_of
from mmmoe_pretrain.checkpoint.folders import (
    candidates,
    checkpoints,
    clean,
    complete,
    find_latest,
    prune,
    read_file,
    read_meta,
    rewind,
)
from mmmoe_pretrain.checkpoint.index import MAX_INDEX, Index, boxes_of, manifest_json, parse_index, parse_manifest
from mmmoe_pretrain.checkpoint.names import INDEX, Checkpoint
from mmmoe_pretrain.checkpoint.planner import LogicalLoadPlanner, LogicalTensor, fill, logical_tensors, tiles
from mmmoe_pretrain.checkpoint.reader import CheckpointReader
from mmmoe_pretrain.checkpoint.retention import Retention
from mmmoe_pretrain.checkpoint.save_plan import plan_save, write_checkpoint
from mmmoe_pretrain.checkpoint.sharded import Piece, ShardedParameter, ShardedState
from mmmoe_pretrain.checkpoint.state import ParameterState
from mmmoe_pretrain.checkpoint.storage import open_storage

__all__ = [
    "Checkpoint", "Retention", "candidates", "checkpoints", "clean", "find_latest", "load", "load_weights", "prune",
    "read_meta", "read_state", "rewind", "save", "verify", "write_state",
]  # fmt: skip


def save(
    root: str | Path,
    step: int,
    state: ShardedState,
    meta: Mapping[str, Any],
    group: ProcessGroup | None,
    keep: Retention,
    metric: float | None = None,
) -> Checkpoint:
    """Write the checkpoint of ``step`` from all ranks of ``group``, then delete those that ``keep`` does not keep.

    Raises ValueError (a StorageError where the disk or service is the cause) on every rank; the checkpoints
    before are then as they were.
    """
    storage = agree(group, lambda: open_storage(root))
    on_first(group, lambda: clean(root))
    plan = plan_save(state, group)
    told = meta if metric is None else {**meta, "metric": metric}
    checkpoint = write_checkpoint(storage, step, plan, plan.views(state), told, group)
    on_first(group, lambda: prune(root, keep))
    return checkpoint


def verify(checkpoint: Checkpoint, group: ProcessGroup | None = None) -> None:
    """Read every file and compare its hash, the ranks sharing the files. Rank 0 alone lists the folder.

    Raises ValueError on every rank; it names the damaged files.
    """

    def share(ranks: list[None]) -> list[list[FileRecord]]:
        files = complete(open_storage(checkpoint.root), checkpoint).files
        ordered = sorted(files.values(), key=lambda record: (-record.nbytes, record.name))
        return [ordered[rank :: len(ranks)] for rank in range(len(ranks))]

    def damaged() -> list[str]:
        storage = open_storage(checkpoint.root)
        paths = {record.name: f"{checkpoint.name}/{record.name}" for record in mine}
        return [r.name for r in mine if digest_of(storage, paths[r.name], r.nbytes) != r.digest]

    def refuse(ranks: list[list[str]]) -> list[None]:
        bad = sorted(name for names in ranks for name in names)
        if bad:
            raise ValueError(
                f"{checkpoint} is damaged: {', '.join(bad[:3])} ({len(bad)} files in all) are not as they were "
                f"written; delete that folder to go on from the one before, or restore the files"
            )
        return [None] * len(ranks)

    mine = exchange(group, lambda: None, share)
    exchange(group, damaged, refuse)


def load(checkpoint: Checkpoint, like: ShardedState, group: ProcessGroup | None) -> ShardedState:
    """The numbers of ``checkpoint`` for the pieces that ``like`` has, in tensors of their own.

    Called on all ranks of ``group``, each with the names and pieces that it holds. Raises ValueError on every
    rank where the names of all ranks together, or a shape, are not the checkpoint's, or where it is damaged
    (``verify`` sees every damage; this what shows in sizes and places).
    """
    state = {name: parameter.empty_like() for name, parameter in like.items()}
    _read(checkpoint, logical_tensors(state), group, exactly=True)
    return state


def load_weights(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> None:
    """Fill full tensors in place, by logical name, in one process."""
    _read(checkpoint, {f"model/{name}": LogicalTensor.whole(t) for name, t in weights.items()}, None, exactly=False)


def read_state(checkpoint: Checkpoint) -> dict[str, ParameterState]:
    """Everything that a checkpoint holds, in full, in one process."""
    index = _index(checkpoint)
    tensors = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in index.items()}
    _read(checkpoint, {key: LogicalTensor.whole(t) for key, t in tensors.items()}, None, exactly=True)
    names = [key.removeprefix("model/") for key in tensors if key.startswith("model/")]
    return {
        name: ParameterState(
            tensors[f"model/{name}"],
            tensors.get(f"optimizer/{name}/exp_avg"),
            tensors.get(f"optimizer/{name}/exp_avg_sq"),
        )
        for name in names
    }


def write_state(root: str | Path, step: int, state: dict[str, ParameterState], meta: Mapping[str, Any]) -> Checkpoint:
    """``save`` of full tensors from one process; deletes none."""

    def whole(tensor: Tensor | None) -> tuple[Piece, ...] | None:
        return None if tensor is None else (Piece((0,) * tensor.dim(), tensor),)

    sharded = {
        name: ShardedParameter(tuple(p.value.shape), whole(p.value) or (), whole(p.exp_avg), whole(p.exp_avg_sq))
        for name, p in state.items()
    }
    plan = plan_save(sharded, None)
    return write_checkpoint(open_storage(root), step, plan, plan.views(sharded), meta, None)


def _read(
    checkpoint: Checkpoint, tensors: dict[str, LogicalTensor], group: ProcessGroup | None, exactly: bool
) -> None:
    storage = agree(group, lambda: open_storage(checkpoint.root))
    index = _index(checkpoint, group)
    with _plain_errors():
        dcp.load(
            tensors,
            storage_reader=CheckpointReader(storage, checkpoint.name, index),
            planner=LogicalLoadPlanner(str(checkpoint), exactly),
            process_group=group,
            no_dist=group is None,
        )


def _index(checkpoint: Checkpoint, group: ProcessGroup | None = None) -> Index:
    """What a complete checkpoint holds, without holes. Rank 0 alone looks at the disk, every rank parses."""

    def manifest_bytes() -> bytes:
        return manifest_json(complete(open_storage(checkpoint.root), checkpoint))

    def index_bytes() -> bytes:
        return read_file(open_storage(checkpoint.root), checkpoint, INDEX, MAX_INDEX)

    files = parse_manifest(broadcast(group, manifest_bytes), str(checkpoint)).files
    sizes, data = {name: record.nbytes for name, record in files.items()}, broadcast(group, index_bytes)
    index = agree(group, lambda: parse_index(data, sizes, str(checkpoint)))
    on_first(group, lambda: _refuse_holes(checkpoint, index))
    return index


def _refuse_holes(checkpoint: Checkpoint, index: Index) -> None:
    for key, tensor in index.items():
        boxes = set(boxes_of(tensor))
        if len(boxes) != len(tensor.boxes) or not tiles(boxes, tensor.shape):
            raise ValueError(
                f"{checkpoint} is damaged: it holds {fill(boxes, tensor.shape)} of {key}; "
                f"delete that folder to go on from the one before"
            )


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a rank raised, on every rank, in place of torch's wrapping of it, which is no Exception; and
    without torch's remarks that a process group is missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no_dist.*|.*single process.*|.*torch.distributed is disabled.*")
        try:
            yield
        except CheckpointException as error:
            first, _ = error.failures[min(error.failures)]
            raise first from error
