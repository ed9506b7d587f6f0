"""How torch.distributed.checkpoint reads logical tensors of which each rank wants pieces.

Every rank asks for the boxes that it wants, whatever cut the checkpoint or the rank; nothing is gathered.
Rank 0 sees what everybody asks for before a byte is read and refuses what is of another model; every rank
then raises its error.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, LoadPlan, Metadata
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem

from mmmoe_pretrain.checkpoint.sharded import Piece, ShardedState
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

    def held(self) -> list[tuple[Box, torch.dtype]]:
        """The boxes of this rank."""
        return [(Box(tuple(offset), tuple(t.shape)), t.dtype) for offset, t in self._by_offset.items()]

    def __create_write_items__(self, fqn: str, object: object) -> list[WriteItem]:
        raise AssertionError("save_plan.py plans what is written")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, tensor.shape) for offset, tensor in self._by_offset.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._by_offset[index.offset]


def logical_tensors(state: ShardedState) -> dict[str, LogicalTensor]:
    """What a checkpoint holds of ``state``, by key."""
    return {
        key: LogicalTensor(parameter.shape, pieces)
        for name, parameter in state.items()
        for key, pieces in parameter.named(name).items()
    }


class LogicalLoadPlanner(DefaultLoadPlanner):
    """Fills the pieces that each rank holds of tensors of ``checkpoint``.

    Raises ValueError for names that it lacks, other shapes, and, if ``exactly``, names that no rank asks for.
    """

    def __init__(self, checkpoint: str, exactly: bool) -> None:
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
                f"all); its meta.json has the config that it was saved under"
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


def _shapes(tensors: Mapping[str, LogicalTensor]) -> dict[str, Shape]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _stored_shapes(metadata: Metadata) -> dict[str, Shape]:
    stored = metadata.state_dict_metadata
    return {key: tuple(item.size) for key, item in stored.items() if isinstance(item, TensorStorageMetadata)}


def fill(boxes: Iterable[Box], shape: Shape) -> str:
    """How much of a tensor boxes hold, for people."""
    held, whole = sum(math.prod(box.size) for box in boxes), math.prod(shape)
    return f"{held} of the {whole} numbers" + (", some twice," if held >= whole else "")
