"""The state that each rank of a job would export for a checkpoint, without the memory of its numbers.

The model is built once, on the device ``meta``, by ``mmmoe_pretrain/plan/build.py``'s functions. Its parameters are
then cut for each rank, by the code that the engines use: the expert rank's share of the experts, and of that the
range that the rank's optimizer holds. ``ranges_of_buckets``: as megatron-core's distributed optimizer cuts its
buffers (ZeRO-1). ``ranges_of_parameters``: as ZeRO-3 cuts every parameter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from mmmoe_pretrain.checkpoint.state import (
    ShardedState,
    ShardedTensor,
    model_key,
    optimizer_key,
    persistent_buffers,
    pieces_of_range,
)
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.apply import cut_trunk
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.placement import Placement, logical_shape, placements
from mmmoe_pretrain.plan.build import meta_models, pretended_groups
from mmmoe_pretrain.plan.communication import BUCKET_ALIGNMENT, PARAMETER_ALIGNMENT, padded

BUCKET, BUCKET_A_RANK = 40_000_000, 1_000_000  # numbers of a bucket at least, and for each data rank (megatron-core)


@dataclass(frozen=True)
class Part:
    """What a rank's model holds of a parameter."""

    name: str
    shape: tuple[int, ...]
    placement: Placement
    expert: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Job:
    """A model and the layout that holds it. ``parts``: of expert rank 0. ``buffers``: shapes, by name."""

    layout: Layout
    parts: tuple[Part, ...]
    buffers: dict[str, tuple[int, ...]]
    moments: tuple[str, ...]


Ranges = Callable[[list[int], int, int], Iterator[tuple[int, int, int]]]  # sizes, rank, ranks -> which, start, length


def job_of(config: RunConfig, ranks: int) -> Job:
    """The job of ``config``, which has one pipeline stage."""
    layout = resolve_layout(config, ranks)
    with pretended_groups(layout) as groups:
        (model,) = meta_models(config, groups, cut_trunk(config, 1))
    placed = placements(model)
    parts = tuple(
        Part(name, tuple(p.shape), placed[name], not getattr(p, "allreduce", True))
        for name, p in model.named_parameters()
    )
    buffers = {name: tuple(buffer.shape) for name, buffer in persistent_buffers(model).items()}
    return Job(layout, parts, buffers, tuple(config.optimizer.state))


def states_of(job: Job, ranges: Ranges, count: int | None = None) -> list[ShardedState]:
    """Of the first ``count`` ranks (None: all); ranks share what is equal on them."""
    keys = {
        part.name: (model_key(part.name), *(optimizer_key(part.name, m) for m in job.moments)) for part in job.parts
    }
    buffers = {
        model_key(name): ShardedTensor.whole(torch.empty(shape, device="meta")) for name, shape in job.buffers.items()
    }
    nothing = {
        key: ShardedTensor(logical_shape(part.shape, part.placement), {})
        for part in job.parts
        for key in keys[part.name]
    }
    found = []
    for rank in range(job.layout.world_size if count is None else count):
        held = dict(nothing)
        for part, start, length in _held(job, ranges, rank):
            placement = tuple(
                dataclasses.replace(cut, index=rank % job.layout.expert) if cut.parts > 1 else cut
                for cut in part.placement
            )
            pieces = pieces_of_range(torch.empty(length, device="meta"), start, part.shape, placement)
            tensor = ShardedTensor(logical_shape(part.shape, part.placement), pieces)
            held |= dict.fromkeys(keys[part.name], tensor)
        found.append(held | buffers)
    return found


def _held(job: Job, ranges: Ranges, rank: int) -> Iterator[tuple[Part, int, int]]:
    """What the optimizer of a rank holds: the part, and the range of it. Tensor and pipeline size are 1."""
    layout = job.layout
    for expert, place, ranks in (
        (False, rank, layout.data),
        (True, rank // layout.expert, layout.expert_data),
    ):
        parts = [part for part in job.parts if part.expert == expert]
        for number, start, length in ranges([part.numel for part in parts], place, ranks):
            yield parts[number], start, length


def ranges_of_buckets(numels: list[int], rank: int, ranks: int) -> Iterator[tuple[int, int, int]]:
    """A buffer of the parameters from the last to the first, in buckets; a rank has an equal share of each bucket."""
    most, bucket, at = max(BUCKET, BUCKET_A_RANK * ranks), list[tuple[int, int, int]](), 0
    for number in reversed(range(len(numels))):
        at = padded(at, PARAMETER_ALIGNMENT)
        bucket.append((number, at, numels[number]))
        at += numels[number]
        if at >= most or number == 0:
            share = padded(at, math.lcm(ranks, BUCKET_ALIGNMENT)) // ranks
            for held, begin, numel in bucket:
                start, end = max(begin, rank * share), min(begin + numel, (rank + 1) * share)
                if start < end:
                    yield held, start - begin, end - start
            bucket, at = [], 0


def ranges_of_parameters(numels: list[int], rank: int, ranks: int) -> Iterator[tuple[int, int, int]]:
    """An equal share of each."""
    for number, numel in enumerate(numels):
        share = -(-numel // ranks)
        length = min(share, numel - rank * share)
        if length > 0:
            yield number, rank * share, length
