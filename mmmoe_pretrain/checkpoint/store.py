"""Writing, finding and reading the checkpoints under a root, which is a path or any fsspec URL.

A checkpoint is a folder (names.py) of safetensors files with the logical tensors of state.py, as the boxes that ranks
held. It is complete if it has a manifest and every file has the size in the manifest.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmmoe_pretrain.checkpoint.files import FileRecord, digest_of
from mmmoe_pretrain.checkpoint.folders import (
    Retention,
    candidates,
    checkpoints,
    clean,
    complete,
    find_latest,
    prune,
    read_meta,
    rewind,
)
from mmmoe_pretrain.checkpoint.index import Index
from mmmoe_pretrain.checkpoint.load_plan import Reads, fill_pieces, plan_load, read_index
from mmmoe_pretrain.checkpoint.names import Checkpoint
from mmmoe_pretrain.checkpoint.save_plan import plan_save, write_checkpoint
from mmmoe_pretrain.checkpoint.state import Shape, ShardedState, ShardedTensor, WholeState, model_key, split_key
from mmmoe_pretrain.checkpoint.storage import open_storage
from mmmoe_pretrain.parallel.agreement import agree, exchange, exchange_distinct, exchange_each, from_rank_0

__all__ = [
    "Checkpoint", "Retention", "candidates", "checkpoints", "clean", "find_latest", "load", "load_weights", "prune",
    "read_meta", "read_state", "rewind", "verify", "write_state",
]  # fmt: skip


def verify(checkpoint: Checkpoint, group: ProcessGroup | None = None) -> None:
    """Read every file and compare its hash. Rank 0 alone lists the folder, and gives each rank its share of the
    files.

    Raises ValueError on every rank; it names the damaged files.
    """

    def shares(ranks: list[None]) -> list[list[FileRecord]]:
        files = complete(open_storage(checkpoint.root), checkpoint).files.values()
        ordered = sorted(files, key=lambda record: (-record.nbytes, record.name))
        return [ordered[rank :: len(ranks)] for rank in range(len(ranks))]

    mine = exchange_each(group, lambda: None, shares)

    def damaged() -> list[str]:
        storage = open_storage(checkpoint.root)
        return [r.name for r in mine if digest_of(storage, f"{checkpoint.name}/{r.name}", r.nbytes) != r.digest]

    def refuse(ranks: list[list[str]]) -> None:
        bad = sorted(name for names in ranks for name in names)
        if bad:
            raise ValueError(
                f"{checkpoint} is damaged: {', '.join(bad[:3])} ({len(bad)} files in all) are not as they were "
                f"written; delete that folder to resume from the one before, or restore the files"
            )

    exchange(group, damaged, refuse)


def load(checkpoint: Checkpoint, like: ShardedState, group: ProcessGroup | None) -> ShardedState:
    """The numbers of ``checkpoint`` for the pieces that ``like`` has, in tensors of their own.

    Called on all ranks of ``group``, each with the keys and pieces that it holds. Raises ValueError on every
    rank where the keys of all ranks together, or a shape, are not the checkpoint's, or where it is damaged
    (``verify`` sees every damage; this what shows in sizes and places).
    """
    state = {key: tensor.empty_like() for key, tensor in like.items()}
    _read(checkpoint, state, group, exactly=True)
    return state


def load_weights(checkpoint: Checkpoint, weights: dict[str, Tensor]) -> None:
    """Fill full tensors in place, by the names of their parameters, in one process."""
    wanted = {model_key(name): ShardedTensor.whole(tensor) for name, tensor in weights.items()}
    _read(checkpoint, wanted, None, exactly=False)


def read_state(checkpoint: Checkpoint) -> WholeState:
    """Everything that a checkpoint holds, in full, in one process."""
    index = read_index(open_storage(checkpoint.root), checkpoint)
    tensors = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in index.tensors.items()}
    _read(checkpoint, {key: ShardedTensor.whole(tensor) for key, tensor in tensors.items()}, None, exactly=True)
    return tensors


def write_state(root: str | Path, step: int, state: WholeState, meta: Mapping[str, Any]) -> Checkpoint:
    """Write the checkpoint of ``step`` of full tensors, from one process; deletes none. Raises ValueError (a
    StorageError where the disk or service is the cause); the checkpoints before are then as they were."""
    sharded = {key: ShardedTensor.whole(tensor) for key, tensor in state.items()}
    plan = plan_save(sharded, None)
    return write_checkpoint(open_storage(root), step, plan, plan.views(sharded), meta, None)


def _read(checkpoint: Checkpoint, state: ShardedState, group: ProcessGroup | None, exactly: bool) -> None:
    """Fill the pieces of ``state``."""
    reads = plan_reads(checkpoint, state, group, exactly)
    agree(group, lambda: fill_pieces(open_storage(checkpoint.root), checkpoint, reads))


def plan_reads(
    checkpoint: Checkpoint, state: ShardedState, group: ProcessGroup | None, exactly: bool = True
) -> Reads:
    """What this rank reads for the pieces of ``state``. Rank 0 checks the keys and shapes of all ranks.
    Collective."""
    storage = agree(group, lambda: open_storage(checkpoint.root))
    index = from_rank_0(group, lambda: read_index(storage, checkpoint))
    exchange_distinct(
        group,
        lambda: [(key, tensor.shape) for key, tensor in state.items()],
        lambda asked, _: _refuse_other_model(checkpoint, index, asked, exactly),
    )
    return agree(group, lambda: plan_load(storage, checkpoint, index, state))


def _refuse_other_model(
    checkpoint: Checkpoint, index: Index, asked: Sequence[Sequence[tuple[str, Shape]]], exactly: bool
) -> None:
    """ValueError for keys that are not there, other shapes, and, if ``exactly``, keys that no rank asks for."""
    stored = {key: tensor.shape for key, tensor in index.tensors.items()}
    wanted: dict[str, set[Shape]] = defaultdict(set)
    for key, shape in itertools.chain.from_iterable(asked):
        wanted[key].add(shape)
    problems = [f"lacks {key}" for key in sorted(wanted.keys() - stored.keys())]
    if exactly:
        problems += [f"has {key}, which this model does not have" for key in sorted(stored.keys() - wanted.keys())]
    for key in sorted(wanted.keys() & stored.keys()):
        others = sorted(wanted[key] - {stored[key]})
        problems += [f"has {key} as {list(stored[key])}, and this model {list(other)}" for other in others]
    kept, of_run = (sorted({tensor for key in keys if (tensor := split_key(key)[1])}) for keys in (stored, wanted))
    if exactly and kept != of_run:
        raise ValueError(
            f"{checkpoint} has the optimizer state {kept}, and the optimizer of this run keeps {of_run}; set "
            f"optimizer.kind, momentum, average and hold as its meta.json has them, or change them with mmmoe extend"
        )
    if problems:
        raise ValueError(
            f"{checkpoint} is of another model: it {'; '.join(problems[:3])} ({len(problems)} such in "
            f"all); its meta.json has the config that it was saved under"
        )
