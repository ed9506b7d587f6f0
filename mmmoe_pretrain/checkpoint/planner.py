"""How torch.distributed.checkpoint writes and reads logical tensors of which each rank holds pieces.

Every rank offers the boxes that it holds and asks for the boxes that it wants, whatever cut either;
nothing is gathered. Rank 0 sees everybody's boxes before a byte is written or read and refuses what
is not whole, or of another model; every rank then raises its error.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, LoadPlan, Metadata, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from mmmoe_pretrain.checkpoint.sharded import Piece
from mmmoe_pretrain.parallel.placement import Box

Shape = tuple[int, ...]


class LogicalTensor:
    """One tensor of a checkpoint and this rank's pieces of it, which may be none.

    Implements torch's ``_Checkpointable`` protocol.
    """

    def __init__(self, shape: Shape, pieces: Iterable[Piece]) -> None:
        self.shape = torch.Size(shape)
        held = [p for p in pieces if p.tensor.numel() or p.tensor.shape == self.shape]  # empty ones are nowhere
        self._by_offset = {torch.Size(p.offset): p.tensor for p in held}
        assert len(self._by_offset) == len(held), [p.offset for p in held]

    @classmethod
    def whole(cls, tensor: Tensor) -> LogicalTensor:
        """A tensor that this process holds in full."""
        return cls(tuple(tensor.shape), [Piece((0,) * tensor.dim(), tensor)])

    def size(self) -> torch.Size:
        return self.shape

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        return [
            WriteItem(
                MetadataIndex(fqn, offset),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    ChunkStorageMetadata(offset, tensor.shape), TensorProperties(tensor.dtype), self.shape
                ),
            )
            for offset, tensor in self._by_offset.items()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, tensor.shape) for offset, tensor in self._by_offset.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._by_offset[index.offset]


class LogicalSavePlanner(DefaultSavePlanner):
    """Writes what several ranks hold once, by the one with least to write.

    Raises ValueError where the ranks' pieces of a tensor do not make up the whole of it.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        return replace(super().create_local_plan(), planner_data=_shapes(self.state_dict))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        _refuse_holes(all_plans)
        return super().create_global_plan(_written_once([replace(plan, planner_data=None) for plan in all_plans]))

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class LogicalLoadPlanner(DefaultLoadPlanner):
    """Fills the pieces that each rank holds of tensors of ``checkpoint``.

    Raises ValueError for names that it lacks, other shapes, and, if ``exactly``, names that no rank asks for.
    """

    def __init__(self, checkpoint: Path, exactly: bool) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.checkpoint = checkpoint
        self.exactly = exactly

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # Not super's: it replaces what is no torch tensor.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata = metadata
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        wanted = _shapes(self.state_dict)
        stored = _stored_shapes(self.metadata)
        fitting = {key: self.state_dict[key] for key, shape in wanted.items() if stored.get(key) == shape}
        return replace(create_default_local_load_plan(fitting, self.metadata), planner_data=wanted)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        assert self.metadata is not None
        wanted: dict[str, set[Shape]] = defaultdict(set)
        for key, shape in itertools.chain.from_iterable(plan.planner_data.items() for plan in global_plan):
            wanted[key].add(shape)
        self._refuse_other_model(wanted, _stored_shapes(self.metadata))
        self._refuse_damage(wanted.keys() & self.metadata.state_dict_metadata.keys())
        return [replace(plan, planner_data=None) for plan in global_plan]

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].__get_tensor_shard__(index)

    def _refuse_other_model(self, wanted: Mapping[str, set[Shape]], stored: Mapping[str, Shape]) -> None:
        problems = [f"lacks {key}" for key in sorted(wanted.keys() - stored.keys())]
        if self.exactly:
            problems += [f"has {key}, which this model has not" for key in sorted(stored.keys() - wanted.keys())]
        for key in sorted(wanted.keys() & stored.keys()):
            others = sorted(wanted[key] - {stored[key]})
            problems += [f"has {key} as {list(stored[key])}, and this model {list(other)}" for other in others]
        if problems:
            raise ValueError(
                f"{self.checkpoint} is of another model: it {'; '.join(problems[:3])} ({len(problems)} such in "
                f"all); it was saved under the config in {self.checkpoint.parents[1] / 'config.yaml'}"
            )

    def _refuse_damage(self, keys: Iterable[str]) -> None:
        assert self.metadata is not None
        for key in sorted(keys):
            item = self.metadata.state_dict_metadata[key]
            assert isinstance(item, TensorStorageMetadata)
            boxes = {Box(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in item.chunks}
            if not tiles(boxes, tuple(item.size)):
                raise ValueError(
                    f"{self.checkpoint} is damaged: it holds {_fill(boxes, tuple(item.size))} of {key}; "
                    f"continue from an earlier checkpoint"
                )


def tiles(boxes: Iterable[Box], shape: Shape) -> bool:
    """Whether ``boxes`` cover a tensor of ``shape``, each number of it once, and nothing beyond it.

    A sum of boxes is determined by their corners, counted +1 and -1 in turn (its mixed difference): the
    boxes add up to the whole if and only if all corners but the whole's cancel. Linear in the boxes.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for box, weight in itertools.chain(((box, 1) for box in boxes), [(Box((0,) * len(shape), shape), -1)]):
        ends = [((start, 1), (start + length, -1)) for start, length in zip(box.offset, box.size, strict=True)]
        for corner in itertools.product(*ends):
            corners[tuple(place for place, _ in corner)] += weight * math.prod(sign for _, sign in corner)
    return not any(corners.values())


def _refuse_holes(plans: list[SavePlan]) -> None:
    """Of a save: every tensor that a rank names must be held whole, alike wherever it is held twice."""
    shapes: dict[str, set[Shape]] = defaultdict(set)
    boxes: dict[str, set[Box]] = defaultdict(set)
    dtypes: dict[str, set[torch.dtype]] = defaultdict(set)
    for plan in plans:
        for key, shape in plan.planner_data.items():
            shapes[key].add(shape)
        for item in plan.items:
            assert item.tensor_data is not None
            chunk = item.tensor_data.chunk
            boxes[item.index.fqn].add(Box(tuple(chunk.offsets), tuple(chunk.sizes)))
            dtypes[item.index.fqn].add(item.tensor_data.properties.dtype)
    problems = []
    for key in sorted(shapes):
        if len(shapes[key]) > 1 or len(dtypes[key]) > 1:
            told = [*sorted(shapes[key]), *sorted(map(str, dtypes[key]))]
            problems.append(f"disagree on the shape or type of {key}: {', '.join(map(str, told))}")
        elif not tiles(boxes[key], next(iter(shapes[key]))):
            problems.append(f"hold {_fill(boxes[key], next(iter(shapes[key])))} of {key}")
    if problems:
        raise ValueError(
            f"no checkpoint is written: the ranks {'; '.join(problems[:3])} ({len(problems)} such in all); "
            f"the checkpoints before are untouched"
        )


def _written_once(plans: list[SavePlan]) -> list[SavePlan]:
    """Leaves each box to one of the ranks that hold it: those of one holder first, then the largest first,
    to the holder with the fewest bytes so far. torch's own choice weighs a box by its whole tensor."""
    holders: dict[MetadataIndex, list[int]] = defaultdict(list)
    cost: dict[MetadataIndex, int] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            assert item.tensor_data is not None
            holders[item.index].append(rank)
            cost[item.index] = math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
    written = [0] * len(plans)
    writer: dict[MetadataIndex, int] = {}
    for index in sorted(holders, key=lambda index: (len(holders[index]) > 1, -cost[index])):
        writer[index] = min(holders[index], key=written.__getitem__)
        written[writer[index]] += cost[index]
    return [
        replace(plan, items=[item for item in plan.items if writer[item.index] == rank])
        for rank, plan in enumerate(plans)
    ]


def _shapes(tensors: Mapping[str, LogicalTensor]) -> dict[str, Shape]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _stored_shapes(metadata: Metadata) -> dict[str, Shape]:
    stored = metadata.state_dict_metadata
    return {key: tuple(item.size) for key, item in stored.items() if isinstance(item, TensorStorageMetadata)}


def _fill(boxes: Iterable[Box], shape: Shape) -> str:
    held, whole = sum(math.prod(box.size) for box in boxes), math.prod(shape)
    return f"{held} of the {whole} numbers" + (", some twice," if held >= whole else "")
