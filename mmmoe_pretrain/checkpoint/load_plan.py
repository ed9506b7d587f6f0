"""What a rank reads of which file of a checkpoint, and reading it.

index = read_index(storage, checkpoint)                    # on rank 0, for all
reads = plan_load(storage, checkpoint, index, state)       # on each rank: of boxes.bin the rows of what it holds
fill_pieces(storage, checkpoint, reads)
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmmoe_pretrain.checkpoint.boxes import fill, overlaps, rows_near, tiles
from mmmoe_pretrain.checkpoint.files import read_box, read_ranges
from mmmoe_pretrain.checkpoint.folders import complete, read_file
from mmmoe_pretrain.checkpoint.index import MAX_INDEX, Index, StoredTensor, parse_index, refuse_bad_rows
from mmmoe_pretrain.checkpoint.names import BOXES, INDEX, Checkpoint
from mmmoe_pretrain.checkpoint.state import Shape, ShardedState, ShardedTensor, view, within
from mmmoe_pretrain.checkpoint.storage import Storage
from mmmoe_pretrain.parallel.placement import Box


@dataclass(frozen=True)
class Read:
    """The part ``box`` of a stored box of size ``stored``, which begins at byte ``at``, into ``target``."""

    at: int
    stored: Shape
    box: Box
    dtype: torch.dtype
    target: Tensor


Reads = dict[str, list[Read]]  # by file


def read_index(storage: Storage, checkpoint: Checkpoint) -> Index:
    """What a complete checkpoint holds."""
    manifest = complete(storage, checkpoint)
    return parse_index(read_file(storage, checkpoint, INDEX, MAX_INDEX), manifest, str(checkpoint))


def plan_load(storage: Storage, checkpoint: Checkpoint, index: Index, state: ShardedState) -> Reads:
    """What fills the pieces of ``state``, whose keys and shapes are those of ``index``. Raises ValueError where a
    number of them is in no box, or in several."""
    wanted = {
        key: held for key, tensor in state.items() if (held := [b for b, _ in tensor.boxes() if math.prod(b.size)])
    }
    near = {
        key: rows_near(stored.blocks, stored.count, held, stored.shape)
        for key, held in wanted.items()
        for stored in (index.tensors[key],)
    }
    reads: Reads = defaultdict(list)
    for key, rows in _rows(storage, checkpoint, index, near):
        refuse_bad_rows(index, key, rows, str(checkpoint))
        for file, read in _reads(checkpoint, key, index.tensors[key], rows, state[key]):
            reads[index.files[file]].append(read)
    return reads


def _rows(
    storage: Storage, checkpoint: Checkpoint, index: Index, near: dict[str, range]
) -> Iterator[tuple[str, np.ndarray]]:
    """The rows ``near`` of each tensor: int64 [n, 2 + 2d]."""
    places = [index.tensors[key].place(rows) for key, rows in near.items()]
    if index.rows is not None:
        found = [memoryview(index.rows)[begin:end] for begin, end in places]
    else:
        found = read_ranges(storage, f"{checkpoint.name}/{BOXES}", places)
    for key, data in zip(near, found, strict=True):
        dims = len(index.tensors[key].shape)
        yield key, np.frombuffer(data, dtype="<i8").reshape(-1, 2 + 2 * dims)


def _reads(
    checkpoint: Checkpoint, key: str, stored: StoredTensor, rows: np.ndarray, tensor: ShardedTensor
) -> Iterator[tuple[int, Read]]:
    """The number of the file, and what is read of it."""
    dims = len(stored.shape)
    offset, size = rows[:, 2 : 2 + dims], rows[:, 2 + dims :]
    for (mine, _), piece in zip(tensor.boxes(), tensor.pieces.values(), strict=True):
        which, begin, length = overlaps(offset, size, mine)
        where = "" if mine.size == stored.shape else f" at {list(mine.offset)}"
        if not _covers(begin - np.asarray(mine.offset, dtype=np.int64), length, mine.size):
            raise ValueError(
                f"{checkpoint} is damaged: it holds {fill(length, mine.size)} of {key}{where}; delete that "
                f"folder to resume from the one before"
            )
        for row, start, extent in zip(which.tolist(), begin.tolist(), length.tolist(), strict=True):
            file, at, *place = rows[row].tolist()
            common, held = Box(tuple(start), tuple(extent)), Box(tuple(place[:dims]), tuple(place[dims:]))
            target = view(piece.detach(), within(common, mine))
            yield file, Read(at, held.size, within(common, held), stored.dtype, target)


def _covers(offset: np.ndarray, size: np.ndarray, whole: Shape) -> bool:
    if size.prod(axis=1).sum() != math.prod(whole):
        return False
    return len(size) < 2 or tiles(offset, size, whole)  # one of its size inside of it is all of it


def fill_pieces(storage: Storage, checkpoint: Checkpoint, reads: Reads) -> None:
    """Read each file once, forwards."""
    for file, wanted in reads.items():
        with storage.reader(f"{checkpoint.name}/{file}") as read_into:
            for read in sorted(wanted, key=lambda read: read.at):
                target = read.target
                alike = target if target.dtype == read.dtype else torch.empty(target.shape, dtype=read.dtype)
                read_box(read_into, read.at, read.stored, read.box, storage.gap, alike)
                if alike is not target:
                    target.copy_(alike)
