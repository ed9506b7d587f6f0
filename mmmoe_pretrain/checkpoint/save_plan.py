"""Who writes which box of a checkpoint, and writing it: a file a rank, hashed, then committed by rank 0.

    plan = plan_save(state, group)       # once a run: it depends on the layout alone
    tensors = plan.views(state)          # live memory, in the order of plan.entries; a copy of these may be written
    write_checkpoint(storage, step, plan, tensors, meta, group)

Nothing is gathered but descriptions of boxes. What several ranks hold is written by one of them (``writers.py``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmmoe_pretrain.checkpoint.files import Entry, FileRecord, header_of, write_hashed, write_tensors
from mmmoe_pretrain.checkpoint.index import Manifest, index_json, manifest_json, meta_json
from mmmoe_pretrain.checkpoint.names import (
    BOXES,
    INDEX,
    LATEST,
    MANIFEST,
    META,
    Checkpoint,
    folder_name,
    rank_file,
)
from mmmoe_pretrain.checkpoint.state import Shape, ShardedState
from mmmoe_pretrain.checkpoint.storage import Storage, StorageError
from mmmoe_pretrain.checkpoint.writers import Offer, Tables, Writers
from mmmoe_pretrain.parallel.agreement import exchange, exchange_distinct, exchange_each, from_rank_0

RETRY = 1.0  # seconds


@dataclass(frozen=True)
class SavePlan:
    """What one rank writes, every time."""

    file: str
    entries: tuple[Entry, ...]  # in the order of the file
    index: tuple[bytes, bytes] | None = field(default=None, repr=False)  # index.json, boxes.bin; on rank 0 alone

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def views(self, state: ShardedState) -> list[Tensor]:
        """The live tensors of ``entries``: perhaps strided, perhaps on a GPU."""
        held = {
            _name(key, at): piece.detach() for key, tensor in state.items() for at, piece in tensor.pieces.items()
        }
        return [held[entry.key] for entry in self.entries]

    def state_keys(self) -> list[str]:
        """Of the logical tensors of ``entries``, in their order."""
        return [entry.key.rpartition("@")[0] for entry in self.entries]


def _name(key: str, offset: Shape) -> str:
    """The name of a box in its file."""
    return f"{key}@{','.join(map(str, offset))}"


def plan_save(state: ShardedState, group: ProcessGroup | None) -> SavePlan:
    """Collective: who writes what. A rank sends its boxes to rank 0, and gets a bit for each. Keys and shapes, which
    many ranks have alike, are sent once. Raises ValueError on every rank if the pieces of all ranks do not cover each
    tensor, if replicas have different boxes, or if the result would be too large to be read.
    """
    tables: list[Tables] = []  # on rank 0
    writers: list[Writers] = []
    kept: list[tuple[bytes, bytes]] = []

    def plan(offers: list[Offer]) -> list[np.ndarray]:
        writers.append(Writers(tables[0], offers))
        return writers[0].chosen

    def keep(heads: list[int]) -> None:
        index = writers[0].index(heads)
        assert index.rows is not None
        kept.append((index_json(index), index.rows))

    exchange_distinct(
        group,
        lambda: [(key, tensor.shape) for key, tensor in state.items()],
        lambda found, which: tables.append(Tables(found, which)),
    )
    chosen = exchange_each(group, lambda: Offer.of(state), plan)
    entries = _entries(state, chosen)
    exchange(group, lambda: len(header_of(entries)[0]), keep)
    rank = 0 if group is None else dist.get_rank(group)
    return SavePlan(rank_file(rank), entries, kept[0] if kept else None)


def _entries(state: ShardedState, chosen: np.ndarray) -> tuple[Entry, ...]:
    """Of the boxes of ``state`` those for which ``chosen`` has a bit, in the order of the file."""
    bits = iter(np.unpackbits(chosen).tolist())
    entries = [
        Entry(_name(key, box.offset), dtype, box.size)
        for key, tensor in state.items()
        for box, dtype in tensor.boxes()
        if next(bits)
    ]
    return tuple(sorted(entries, key=lambda entry: -entry.dtype.itemsize))  # for alignment


def write_checkpoint(
    storage: Storage,
    step: int,
    plan: SavePlan,
    tensors: Sequence[Tensor],
    meta: Mapping[str, Any],
    group: ProcessGroup | None,
) -> Checkpoint:
    """Collective; may run in a thread if ``group`` has no other user. ``tensors`` are those of ``plan.views``, or
    copies of them in host memory, each whole or in parts (``files.write_tensors``).

    If a rank fails, every rank raises its error, the draft is deleted, and earlier checkpoints and ``latest`` do not
    change. Only a failure after ``commit`` leaves the checkpoint: if ``latest`` cannot be replaced (``point_to``), or
    a rank ended before it got the result.
    """
    draft = storage.draft(folder_name(step))
    committed: list[Checkpoint] = []  # on rank 0

    def begin() -> None:
        meta_json(step, meta)  # raises before anything is written
        storage.remove_folder(draft)
        storage.make_folder(draft)

    def write() -> FileRecord:
        return write_tensors(storage, draft, plan.file, plan.entries, tensors)

    def finish(records: list[FileRecord]) -> Checkpoint:
        committed.append(commit(storage, draft, step, plan, records, meta))
        point_to(storage, committed[0])
        return committed[0]

    from_rank_0(group, begin)
    try:
        return exchange(group, write, finish)
    except Exception:
        if plan.index is not None and not committed:  # on a URL the draft is the checkpoint
            with suppress(StorageError):  # the next run removes it
                storage.remove_folder(draft)
        raise


def commit(
    storage: Storage, draft: str, step: int, plan: SavePlan, records: Sequence[FileRecord], meta: Mapping[str, Any]
) -> Checkpoint:
    """On rank 0, after every rank has written: make the draft a checkpoint, in place of one of the same step. Raises
    StorageError where a file of ``records`` is not there.

    Runs resume from it once ``point_to`` has been called (``folders.candidates``).
    """
    assert plan.index is not None, "only rank 0 commits"
    index, rows = plan.index
    there = storage.sizes(draft)
    for record in records:
        if there.get(record.name) != record.nbytes:
            raise StorageError(
                f"{storage.root}/{draft}/{record.name} was written with {record.nbytes:,} bytes, and rank 0 sees "
                f"{there.get(record.name, 'no such file')}; checkpoint.folder must be one that all nodes share"
            )
    more = [
        write_hashed(storage, draft, INDEX, [index]),
        write_hashed(storage, draft, BOXES, [rows]),
        write_hashed(storage, draft, META, [meta_json(step, meta)]),
    ]
    files = {record.name: record for record in (*records, *more)}
    storage.write(f"{draft}/{MANIFEST}", [manifest_json(Manifest(step, files))])
    name = folder_name(step)
    storage.publish(name)
    return Checkpoint(storage.root, name, step)


def point_to(storage: Storage, checkpoint: Checkpoint) -> None:
    """On rank 0: let ``latest`` name this one, with one retry. If both fail, the save has failed and runs resume from
    the one before; nothing is removed, and the next successful save makes both valid."""
    try:
        storage.replace(LATEST, f"{checkpoint.name}\n".encode())
    except StorageError:
        time.sleep(RETRY)
        try:
            storage.replace(LATEST, f"{checkpoint.name}\n".encode())
        except StorageError as error:
            raise StorageError(
                f"{checkpoint} is written, but {LATEST} may still name the one before, and runs resume from that: "
                f"{error}"
            ) from error
