"""Pipeline stages: which blocks each holds, cut by cost."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True)
class Stage:
    """A run of the trunk's blocks. The first stage also holds the embedders; the last one the final
    normalisation, heads and objectives."""

    first_block: int
    end_block: int
    first: bool = True
    last: bool = True

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.end_block)

    @property
    def recomputed(self) -> range:
        """The blocks that ``train.recompute: blocks`` computes again: all but the model's last one, whose backward
        pass comes next, so that it would be computed twice for little memory."""
        return range(self.first_block, self.end_block - self.last)


def whole(num_blocks: int) -> Stage:
    """One stage that holds everything."""
    return Stage(0, num_blocks)


def cut_stages(costs: Sequence[float], num_stages: int, first_extra: float, last_extra: float) -> tuple[Stage, ...]:
    """Runs of blocks with the least cost of the costliest run, as a pipeline is as slow as that one.

    ``costs``: of each block, in any unit; the extras are what the first and the last stage do beside
    their blocks. Exact. Of equal cuts the one with the most even numbers of blocks is taken, which
    also spreads memory. Raises ValueError where a stage would hold no block.
    """
    if not 1 <= num_stages <= len(costs):
        raise ValueError(
            f"{len(costs)} blocks cannot be cut into {num_stages} pipeline stages of at least one block; use 1 to "
            f"{len(costs)} stages"
        )
    before = [0.0, *accumulate(costs)]

    def cost(stage: int, begin: int, end: int) -> float:
        extra = (first_extra if stage == 0 else 0.0) + (last_extra if stage == num_stages - 1 else 0.0)
        return before[end] - before[begin] + extra

    def squared_count(stage: int, begin: int, end: int) -> float:
        return (end - begin) ** 2 if cost(stage, begin, end) <= bound else math.inf

    bound, _ = _best_cut(len(costs), num_stages, cost, max)
    _, bounds = _best_cut(len(costs), num_stages, squared_count, operator.add)
    return tuple(
        Stage(begin, end, first=stage == 0, last=stage == num_stages - 1)
        for stage, (begin, end) in enumerate(pairwise(bounds))
    )


def _best_cut(
    num_blocks: int,
    num_stages: int,
    price: Callable[[int, int, int], float],
    combine: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """The least combined price of all stages, and the blocks at which they begin and end.

    ``price(stage, begin, end)`` of one stage; ``combine`` grows with both arguments. Dynamic
    programming over (stage, end): stages * blocks^2 / 2 prices.
    """
    best = [0.0] + [math.inf] * num_blocks  # by end of the stages so far
    begins = []  # of each stage, by its end
    for stage in range(num_stages):
        totals, begin_at = [math.inf] * (num_blocks + 1), [stage] * (num_blocks + 1)
        for end in range(stage + 1, num_blocks - (num_stages - 1 - stage) + 1):
            options = [combine(best[begin], price(stage, begin, end)) for begin in range(stage, end)]
            totals[end] = min(options)
            begin_at[end] = stage + options.index(totals[end])
        best = totals
        begins.append(begin_at)
    bounds = [num_blocks]
    for begin_at in reversed(begins):
        bounds.append(begin_at[bounds[-1]])
    return best[num_blocks], bounds[::-1]


def stages_of_rank(
    stages: Sequence[Stage], pipeline_rank: int, pipeline_size: int, virtual_size: int
) -> tuple[Stage, ...]:
    """The stages that a pipeline rank holds, in the order of Megatron's interleaved schedule: its
    chunk v is stage v * pipeline_size + rank."""
    assert len(stages) == pipeline_size * virtual_size, (len(stages), pipeline_size, virtual_size)
    return tuple(stages[pipeline_rank::pipeline_size])
