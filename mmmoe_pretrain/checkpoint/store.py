"""Writing, finding and reading the checkpoints under a root, which is a path or any fsspec URL.

A checkpoint is a folder (names.py) of safetensors files with the logical tensors of state.py, as the boxes that ranks
held. It is complete if it has a manifest and every file has the size in the manifest.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmmoe_pretrain.checkpoint.files import digest_of, read_box
from mmmoe_pretrain.checkpoint.folders import (
    Retention,
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
from mmmoe_pretrain.checkpoint.index import MAX_INDEX, Index, StoredBox, fill, parse_index, tiles
from mmmoe_pretrain.checkpoint.names import INDEX, Checkpoint
from mmmoe_pretrain.checkpoint.save_plan import plan_save, write_checkpoint
from mmmoe_pretrain.checkpoint.state import (
    Shape,
    ShardedState,
    ShardedTensor,
    WholeState,
    intersection,
    model_key,
    split_key,
    view,
    within,
)
from mmmoe_pretrain.checkpoint.storage import Storage, open_storage
from mmmoe_pretrain.parallel.agreement import agree, exchange, from_rank_0
from mmmoe_pretrain.parallel.placement import Box

__all__ = [
    "Checkpoint", "Retention", "candidates", "checkpoints", "clean", "find_latest", "load", "load_weights", "prune",
    "read_meta", "read_state", "rewind", "verify", "write_state",
]  # fmt: skip


def verify(checkpoint: Checkpoint, group: ProcessGroup | None = None) -> None:
    """Read every file and compare its hash, the ranks sharing the files. Rank 0 alone lists the folder.

    Raises ValueError on every rank; it names the damaged files.
    """
    files = from_rank_0(group, lambda: complete(open_storage(checkpoint.root), checkpoint)).files
    ordered = sorted(files.values(), key=lambda record: (-record.nbytes, record.name))
    mine = ordered if group is None else ordered[dist.get_rank(group) :: dist.get_world_size(group)]

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
    index = _index(checkpoint)
    tensors = {key: torch.empty(tensor.shape, dtype=tensor.dtype) for key, tensor in index.items()}
    _read(checkpoint, {key: ShardedTensor.whole(tensor) for key, tensor in tensors.items()}, None, exactly=True)
    return tensors


def write_state(root: str | Path, step: int, state: WholeState, meta: Mapping[str, Any]) -> Checkpoint:
    """Write the checkpoint of ``step`` of full tensors, from one process; deletes none. Raises ValueError (a
    StorageError where the disk or service is the cause); the checkpoints before are then as they were."""
    sharded = {key: ShardedTensor.whole(tensor) for key, tensor in state.items()}
    plan = plan_save(sharded, None)
    return write_checkpoint(open_storage(root), step, plan, plan.views(sharded), meta, None)


def _read(checkpoint: Checkpoint, state: ShardedState, group: ProcessGroup | None, exactly: bool) -> None:
    """Fill the pieces of ``state``. Rank 0 checks the requests of all ranks before anything is read."""
    storage = agree(group, lambda: open_storage(checkpoint.root))
    index = from_rank_0(group, lambda: _index(checkpoint))
    exchange(
        group,
        lambda: {key: tensor.shape for key, tensor in state.items()},
        lambda ranks: _refuse_other_model(checkpoint, index, ranks, exactly),
    )
    agree(group, lambda: _fill(storage, checkpoint, index, state))


def _refuse_other_model(checkpoint: Checkpoint, index: Index, ranks: list[dict[str, Shape]], exactly: bool) -> None:
    """ValueError for keys that are not there, other shapes, and, if ``exactly``, keys that no rank asks for."""
    wanted: dict[str, set[Shape]] = defaultdict(set)
    for key, shape in itertools.chain.from_iterable(rank.items() for rank in ranks):
        wanted[key].add(shape)
    problems = [f"lacks {key}" for key in sorted(wanted.keys() - index.keys())]
    if exactly:
        problems += [f"has {key}, which this model does not have" for key in sorted(index.keys() - wanted.keys())]
    for key in sorted(wanted.keys() & index.keys()):
        stored = index[key].shape
        others = sorted(wanted[key] - {stored})
        problems += [f"has {key} as {list(stored)}, and this model {list(other)}" for other in others]
    kept, asked = (sorted({tensor for key in keys if (tensor := split_key(key)[1])}) for keys in (index, wanted))
    if exactly and kept != asked:
        raise ValueError(
            f"{checkpoint} has the optimizer state {kept}, and the optimizer of this run keeps {asked}; set "
            f"optimizer.kind (and momentum) as its meta.json has them"
        )
    if problems:
        raise ValueError(
            f"{checkpoint} is of another model: it {'; '.join(problems[:3])} ({len(problems)} such in "
            f"all); its meta.json has the config that it was saved under"
        )


def _fill(storage: Storage, checkpoint: Checkpoint, index: Index, state: ShardedState) -> None:
    """Read the overlap of the pieces of ``state`` with the stored boxes; each file once, forwards."""
    reads: dict[str, list[tuple[StoredBox, Box, torch.dtype, Tensor]]] = defaultdict(list)
    for key, tensor in state.items():
        for (mine, _), piece in zip(tensor.boxes(), tensor.pieces.values(), strict=True):
            for stored in index[key].boxes:
                common = intersection(mine, stored.box)
                if common is not None:
                    target = view(piece.detach(), within(common, mine))
                    reads[stored.file].append((stored, within(common, stored.box), index[key].dtype, target))
    for file, wanted in reads.items():
        wanted.sort(key=lambda read: read[0].at)
        with storage.reader(f"{checkpoint.name}/{file}") as read_into:
            for stored, box, dtype, target in wanted:
                alike = target if target.dtype == dtype else torch.empty(target.shape, dtype=dtype)
                read_box(read_into, stored.at, stored.box.size, box, storage.gap, alike)
                if alike is not target:
                    target.copy_(alike)


def _index(checkpoint: Checkpoint) -> Index:
    """What a complete checkpoint holds. Raises ValueError where the boxes of a tensor do not make up the whole."""
    storage = open_storage(checkpoint.root)
    sizes = {name: record.nbytes for name, record in complete(storage, checkpoint).files.items()}
    index = parse_index(read_file(storage, checkpoint, INDEX, MAX_INDEX), sizes, str(checkpoint))
    for key, tensor in index.items():
        boxes = {stored.box for stored in tensor.boxes}
        if len(boxes) != len(tensor.boxes) or not tiles(boxes, tensor.shape):
            raise ValueError(
                f"{checkpoint} is damaged: it holds {fill(boxes, tensor.shape)} of {key}; "
                f"delete that folder to resume from the one before"
            )
    return index
