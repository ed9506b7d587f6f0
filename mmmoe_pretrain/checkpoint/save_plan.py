"""Who writes which box of a checkpoint, and writing it: a file a rank, hashed, then committed by rank 0.

    plan = plan_save(state, group)       # once a run: it depends on the layout alone
    tensors = plan.views(state)          # live memory, in the order of plan.entries; a copy of these may be written
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
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from mmmoe_pretrain.checkpoint.files import DTYPES, NAMES, Entry, FileRecord, header_of, write_hashed, write_tensors
from mmmoe_pretrain.checkpoint.index import (
    Index,
    Manifest,
    StoredBox,
    StoredTensor,
    fill,
    index_json,
    manifest_json,
    meta_json,
    refuse_unreadable,
    tiles,
)
from mmmoe_pretrain.checkpoint.names import INDEX, LATEST, MANIFEST, META, Checkpoint, folder_name, rank_file
from mmmoe_pretrain.checkpoint.state import Shape, ShardedState
from mmmoe_pretrain.checkpoint.storage import Storage, StorageError
from mmmoe_pretrain.parallel.agreement import exchange, from_rank_0
from mmmoe_pretrain.parallel.placement import Box

RETRY = 1.0  # seconds


@dataclass(frozen=True)
class SavePlan:
    """What one rank writes, every time."""

    file: str
    entries: tuple[Entry, ...]  # in the order of the file
    index: bytes | None = field(default=None, repr=False)  # index.json, of all ranks' files; on rank 0 alone

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    def views(self, state: ShardedState) -> list[Tensor]:
        """The live tensors of ``entries``: perhaps strided, perhaps on a GPU."""
        held = {
            _name(key, at): piece.detach() for key, tensor in state.items() for at, piece in tensor.pieces.items()
        }
        return [held[entry.key] for entry in self.entries]


_Boxes = list[tuple[Box, torch.dtype]]
_Offers = dict[str, tuple[Shape, _Boxes]]  # what a rank holds, by key of the logical tensor


def _name(key: str, offset: Shape) -> str:
    """The name of a box in its file."""
    return f"{key}@{','.join(map(str, offset))}"


def plan_save(state: ShardedState, group: ProcessGroup | None) -> SavePlan:
    """Collective: who writes what. Only rank 0 gets the boxes of all ranks. Raises ValueError on every rank if the
    pieces of all ranks do not cover each tensor, if replicas have different boxes, or if the result would be too
    large to be read.
    """

    def offer() -> _Offers:
        return {key: (tensor.shape, tensor.boxes()) for key, tensor in state.items()}

    plans: list[SavePlan] = []  # of all ranks, on rank 0
    kept: list[bytes] = []

    def combine(offers: list[_Offers]) -> None:
        found, index = _plans(offers)
        kept.append(index_json(index))  # stays here: every message of a scatter is as long as the longest
        plans.extend(found)

    exchange(group, offer, combine)
    own: list[Any] = plans[:1] or [None]
    if group is not None:
        dist.scatter_object_list(own, plans or None, group=group, group_src=0)
    return replace(own[0], index=kept[0]) if kept else own[0]


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
    there = storage.sizes(draft)
    for record in records:
        if there.get(record.name) != record.nbytes:
            raise StorageError(
                f"{storage.root}/{draft}/{record.name} was written with {record.nbytes:,} bytes, and rank 0 sees "
                f"{there.get(record.name, 'no such file')}; checkpoint.folder must be one that all nodes share"
            )
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


def _plans(offers: list[_Offers]) -> tuple[list[SavePlan], Index]:
    """The plan of each rank, and the index."""
    shapes = _refuse_holes(offers)
    items: list[list[_Item]] = [[] for _ in offers]
    for item, rank in _writers(offers).items():
        items[rank].append(item)
    plans, boxes = [], defaultdict[str, list[StoredBox]](list)
    dtypes: dict[str, torch.dtype] = {}
    for rank, mine in enumerate(items):
        mine.sort(key=lambda item: -item[2].itemsize)  # for alignment; the order is else that of the state
        entries = tuple(Entry(_name(key, box.offset), dtype, box.size) for key, box, dtype in mine)
        plans.append(SavePlan(rank_file(rank), entries))
        _, begins = header_of(entries)
        for (key, box, dtype), at in zip(mine, begins, strict=True):
            boxes[key].append(StoredBox(box, rank_file(rank), at))
            dtypes[key] = dtype
    index = {key: StoredTensor(shape, dtypes[key], tuple(boxes[key])) for key, shape in shapes.items()}
    return plans, index


def _refuse_holes(offers: list[_Offers]) -> dict[str, Shape]:
    """Check that the ranks cover every tensor, with equal shapes and types of replicas. Returns the shapes by key."""
    shapes: dict[str, set[Shape]] = defaultdict(set)
    boxes: dict[str, set[Box]] = defaultdict(set)
    dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
    for mine in offers:
        for key, (shape, held) in mine.items():
            shapes[key].add(shape)
            boxes[key].update(box for box, _ in held)
            dtypes[key].update(dtype for _, dtype in held)
    problems = []
    for key in sorted(shapes):
        for shape in shapes[key]:
            refuse_unreadable(key, shape)
        if len(shapes[key]) > 1 or len(dtypes[key]) > 1:
            values = [*sorted(shapes[key]), *sorted(map(str, dtypes[key]))]
            problems.append(f"disagree on the shape or type of {key}: {', '.join(map(str, values))}")
        elif not tiles(boxes[key], next(iter(shapes[key]))):
            problems.append(f"hold {fill(boxes[key], next(iter(shapes[key])))} of {key}")
        elif not dtypes[key] <= NAMES.keys():
            problems.append(f"hold {key} as {next(iter(dtypes[key]))}; files have {', '.join(DTYPES)}")
    if problems:
        raise ValueError(
            f"no checkpoint is written: the ranks {'; '.join(problems[:3])} ({len(problems)} such in all); "
            f"earlier checkpoints are unchanged"
        )
    return {key: next(iter(found)) for key, found in shapes.items()}


_Item = tuple[str, Box, torch.dtype]  # a box of the logical tensor of that key


def _writers(offers: list[_Offers]) -> dict[_Item, int]:
    """The rank that writes each box: those of one holder first, then the largest first, to the holder with
    the fewest bytes so far."""
    holders: dict[_Item, list[int]] = defaultdict(list)
    for rank, mine in enumerate(offers):
        for key, (_, held) in mine.items():
            for box, dtype in held:
                holders[key, box, dtype].append(rank)
    nbytes = {(key, box, dtype): math.prod(box.size) * dtype.itemsize for key, box, dtype in holders}
    written = [0] * len(offers)
    writer: dict[_Item, int] = {}
    for item in sorted(holders, key=lambda item: (len(holders[item]) > 1, -nbytes[item])):
        writer[item] = min(holders[item], key=written.__getitem__)
        written[writer[item]] += nbytes[item]
    return {item: writer[item] for item in holders}
