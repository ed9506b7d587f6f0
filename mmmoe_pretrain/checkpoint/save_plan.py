"""Who writes which box of a checkpoint, and writing it: a file a rank, hashed, then committed by rank 0.

    plan = plan_save(state, group)       # once a run: it depends on the layout alone
    tensors = plan.views(state)          # live memory, in the order of plan.items; a copy of these may be written
    write_checkpoint(storage, step, plan, tensors, meta, group)

Nothing is gathered but descriptions of boxes. What several ranks hold is written by one of them.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from mmmoe_pretrain.checkpoint.exchange import exchange, on_first
from mmmoe_pretrain.checkpoint.files import DTYPES, NAMES, Entry, FileRecord, header_of, write_hashed, write_tensors
from mmmoe_pretrain.checkpoint.index import (
    Index,
    Manifest,
    StoredBox,
    StoredTensor,
    index_json,
    manifest_json,
    meta_json,
    refuse_unreadable,
)
from mmmoe_pretrain.checkpoint.names import INDEX, LATEST, MANIFEST, META, Checkpoint, folder_name, rank_file
from mmmoe_pretrain.checkpoint.planner import fill, logical_tensors, tiles
from mmmoe_pretrain.checkpoint.sharded import ShardedState
from mmmoe_pretrain.checkpoint.storage import Storage, StorageError
from mmmoe_pretrain.parallel.placement import Box

Shape = tuple[int, ...]
RETRY = 1.0  # seconds


@dataclass(frozen=True)
class Item:
    """One box that a rank writes: of the logical tensor ``key``, from ``offset``."""

    key: str
    offset: Shape
    size: Shape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    @property
    def entry(self) -> Entry:
        """Its name in the file."""
        return Entry(f"{self.key}@{','.join(map(str, self.offset))}", self.dtype, self.size)


@dataclass(frozen=True)
class SavePlan:
    """What one rank writes, every time."""

    file: str
    items: tuple[Item, ...]  # in the order of the file
    index: bytes | None = field(default=None, repr=False)  # index.json, of all ranks' files; on rank 0 alone

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)

    def views(self, state: ShardedState) -> list[Tensor]:
        """The live tensors of ``items``: perhaps strided, perhaps on a GPU."""
        held = {
            (key, piece.offset): piece.tensor.detach()
            for name, parameter in state.items()
            for key, pieces in parameter.named(name).items()
            for piece in pieces
            if piece.tensor.numel() or piece.tensor.shape == parameter.shape
        }
        return [held[item.key, item.offset] for item in self.items]


@dataclass(frozen=True)
class _Offer:
    """What a rank holds of a tensor of ``shape``."""

    shape: Shape
    boxes: tuple[tuple[Box, torch.dtype], ...]


_Offers = dict[str, _Offer]


def plan_save(state: ShardedState, group: ProcessGroup | None) -> SavePlan:
    """Collective: who writes what. The boxes of all ranks are seen by rank 0 alone.

    Raises ValueError on every rank where the pieces of all ranks do not make up each tensor that one of them
    names; what several ranks hold must be cut alike. And where readers would refuse what is written.
    """

    def offer() -> _Offers:
        return {key: _Offer(tuple(t.shape), tuple(t.held())) for key, t in logical_tensors(state).items()}

    kept: list[bytes] = []

    def combine(offers: list[_Offers]) -> list[SavePlan]:
        plans, index = _plans(offers)
        kept.append(index_json(index))  # stays here: every message of a scatter is as long as the longest
        return plans

    plan = exchange(group, offer, combine)
    return replace(plan, index=kept[0]) if kept else plan


def write_checkpoint(
    storage: Storage,
    step: int,
    plan: SavePlan,
    tensors: Sequence[Tensor],
    meta: Mapping[str, Any],
    group: ProcessGroup | None,
) -> Checkpoint:
    """Collective; in a thread, too, if nobody else uses ``group`` meanwhile.

    Where a rank fails, every rank raises its error; then the draft is gone, and the checkpoints before and
    ``latest`` are as they were. Only what fails behind ``commit`` leaves the checkpoint: ``latest`` that could
    not be replaced (``point_to``), or a peer that was gone before it was told.
    """
    draft = begin(storage, step, meta, group)
    committed: list[Checkpoint] = []  # on rank 0

    def finish(records: list[FileRecord]) -> list[Checkpoint]:
        committed.append(commit(storage, draft, step, plan, records, meta))
        point_to(storage, committed[0])
        return committed * len(records)

    try:
        return exchange(group, lambda: write_rank_file(storage, draft, plan, tensors), finish)
    except Exception:
        if plan.index is not None and not committed:  # on a URL the draft is the checkpoint
            abandon(storage, draft)
        raise


def begin(storage: Storage, step: int, meta: Mapping[str, Any], group: ProcessGroup | None) -> str:
    """Collective: an empty folder to write ``step`` in; its name under the root. Before that, ValueError on every
    rank for a ``meta`` that no reader would take."""
    draft = storage.draft(folder_name(step))

    def make() -> str:
        meta_json(step, meta)
        storage.remove_folder(draft)
        storage.make_folder(draft)
        return draft

    return on_first(group, make)


def write_rank_file(storage: Storage, draft: str, plan: SavePlan, tensors: Sequence[Tensor]) -> FileRecord:
    """This rank's file. ``tensors`` are those of ``plan.views``, or copies of them in host memory, each whole or
    in parts (``files.write_tensors``)."""
    return write_tensors(storage, draft, plan.file, [item.entry for item in plan.items], tensors)


def commit(
    storage: Storage, draft: str, step: int, plan: SavePlan, records: Sequence[FileRecord], meta: Mapping[str, Any]
) -> Checkpoint:
    """On rank 0, after every rank has written: make the draft a checkpoint, in place of one of the same step.

    Runs go on from it once ``point_to`` has been called (``folders.candidates``).
    """
    assert plan.index is not None, "only rank 0 commits"
    _refuse_lost_files(storage, draft, records)
    more = [
        write_hashed(storage, draft, INDEX, [plan.index]),
        write_hashed(storage, draft, META, [meta_json(step, meta)]),
    ]
    files = {record.name: record for record in (*records, *more)}
    storage.write(f"{draft}/{MANIFEST}", [manifest_json(Manifest(step, files))])
    name = folder_name(step)
    storage.publish(name)
    return Checkpoint(storage.root, name, step)


def point_to(storage: Storage, checkpoint: Checkpoint) -> None:
    """On rank 0: have ``latest`` name this one, with one more attempt. Where both fail the save has failed, as runs
    go on from the one before; but nothing is removed, and the next save that works makes both count."""
    try:
        storage.replace(LATEST, f"{checkpoint.name}\n".encode())
    except StorageError:
        time.sleep(RETRY)
        try:
            storage.replace(LATEST, f"{checkpoint.name}\n".encode())
        except StorageError as error:
            raise StorageError(
                f"{checkpoint} is written, but {LATEST} may still name the one before, from which runs go on: {error}"
            ) from error


def abandon(storage: Storage, draft: str) -> None:
    """On rank 0: remove a draft that failed. Where even that fails, the next run removes it."""
    with suppress(StorageError):
        storage.remove_folder(draft)


def _refuse_lost_files(storage: Storage, draft: str, records: Sequence[FileRecord]) -> None:
    there = storage.sizes(draft)
    for record in records:
        if there.get(record.name) != record.nbytes:
            raise StorageError(
                f"{storage.root}/{draft}/{record.name} was written with {record.nbytes:,} bytes, and rank 0 sees "
                f"{there.get(record.name, 'no such file')}; checkpoint.folder must be one that all nodes share"
            )


def _plans(offers: list[_Offers]) -> tuple[list[SavePlan], Index]:
    """What each rank writes, and the index of it all."""
    shapes = _refuse_holes(offers)
    items: list[list[Item]] = [[] for _ in offers]
    for item, rank in _writers(offers).items():
        items[rank].append(item)
    plans, boxes = [], defaultdict[str, list[StoredBox]](list)
    dtypes: dict[str, torch.dtype] = {}
    for rank, mine in enumerate(items):
        mine.sort(key=lambda item: -item.dtype.itemsize)  # for alignment; the order is else that of the state
        plans.append(SavePlan(rank_file(rank), tuple(mine)))
        _, begins = header_of([item.entry for item in mine])
        for item, at in zip(mine, begins, strict=True):
            boxes[item.key].append(StoredBox(rank_file(rank), at, item.offset, item.size))
            dtypes[item.key] = item.dtype
    index = {key: StoredTensor(shape, dtypes[key], tuple(boxes[key])) for key, shape in shapes.items()}
    return plans, index


def _refuse_holes(offers: list[_Offers]) -> dict[str, Shape]:
    """Every tensor that a rank names must be held whole, alike wherever it is held twice. The shapes by key."""
    shapes: dict[str, set[Shape]] = defaultdict(set)
    boxes: dict[str, set[Box]] = defaultdict(set)
    dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
    for mine in offers:
        for key, offer in mine.items():
            shapes[key].add(offer.shape)
            boxes[key].update(box for box, _ in offer.boxes)
            dtypes[key].update(dtype for _, dtype in offer.boxes)
    problems = []
    for key in sorted(shapes):
        for shape in shapes[key]:
            refuse_unreadable(key, shape)
        if len(shapes[key]) > 1 or len(dtypes[key]) > 1:
            told = [*sorted(shapes[key]), *sorted(map(str, dtypes[key]))]
            problems.append(f"disagree on the shape or type of {key}: {', '.join(map(str, told))}")
        elif not tiles(boxes[key], next(iter(shapes[key]))):
            problems.append(f"hold {fill(boxes[key], next(iter(shapes[key])))} of {key}")
        elif not dtypes[key] <= NAMES.keys():
            problems.append(f"hold {key} as {next(iter(dtypes[key]))}; files have {', '.join(DTYPES)}")
    if problems:
        raise ValueError(
            f"no checkpoint is written: the ranks {'; '.join(problems[:3])} ({len(problems)} such in all); "
            f"the checkpoints before are untouched"
        )
    return {key: next(iter(found)) for key, found in shapes.items()}


def _writers(offers: list[_Offers]) -> dict[Item, int]:
    """The rank that writes each box: those of one holder first, then the largest first, to the holder with
    the fewest bytes so far."""
    holders: dict[Item, list[int]] = defaultdict(list)
    for rank, mine in enumerate(offers):
        for key, offer in mine.items():
            for box, dtype in offer.boxes:
                holders[Item(key, box.offset, box.size, dtype)].append(rank)
    written = [0] * len(offers)
    writer: dict[Item, int] = {}
    for item in sorted(holders, key=lambda item: (len(holders[item]) > 1, -item.nbytes)):
        writer[item] = min(holders[item], key=written.__getitem__)
        written[writer[item]] += item.nbytes
    return {item: writer[item] for item in holders}
