"""Memory of a microbatch in any pipeline stage of any layout, from single blocks that were run on fake tensors.

A stage keeps the sum of what its blocks keep, and its passes peak in one of them. One block of each kind is run for
each number of tensor ranks, recomputation and engine, at two numbers of samples and at few of expert ranks. All
else is linear: in the tokens, and in the rows that dispatch exchanges. ``activations.py`` runs whole stages;
tests/plan/test_closed.py holds the two together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.megatron import prepare
from mmmoe_pretrain.models.block import is_sparse, kind_of_block
from mmmoe_pretrain.objectives import objectives_of
from mmmoe_pretrain.parallel.degrees import Layout, divisors
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.plan.activations import BALANCED, Device, Imbalance, StageMemory, StageSizes, stage_memory
from mmmoe_pretrain.plan.build import pretended_groups
from mmmoe_pretrain.plan.communication import routed_of
from mmmoe_pretrain.plan.whole_step import NONE, WholeStep, whole_step
from mmmoe_pretrain.plan.workload import full_batch

Bytes = np.ndarray  # kept, forward, backward, buffers
RUN_AT = (2, 4, 8, 16, 32, 64)  # samples: the first two whose tokens differ
RUN_EXPERTS = 8  # expert ranks up to which each number of them is run
COUNTED = 64  # samples whose tokens are counted; more have as many each


@dataclass(frozen=True)
class Block:
    """``alone``: of a stage with this block alone. ``more``: what each further one keeps."""

    alone: Bytes
    more: float


@dataclass(frozen=True)
class Run:
    """What decides the memory of a block beside its kind; ``samples`` of a microbatch."""

    engine: str
    tensor: int
    sequence: bool
    expert: int
    recompute: str
    samples: int


class Coefficients:
    """Of one config, whose layout varies."""

    def __init__(self, config: RunConfig, imbalance: Imbalance = BALANCED, device: Device = "cuda") -> None:
        self.config, self.imbalance, self.device = config, imbalance, device
        self.index = {kind_of_block(config.moe, i): i for i in reversed(range(config.model.num_layers))}
        self._measured = lru_cache(maxsize=None)(self._run)
        self._block = lru_cache(maxsize=None)(self._linear_block)
        self._around = lru_cache(maxsize=None)(self._linear_around)
        self._whole = lru_cache(maxsize=None)(self._run_whole_step)
        self._batch = lru_cache(maxsize=None)(lambda samples: full_batch(config, samples))

    def sizes(self, layout: Layout, recompute: str, stage: Stage, samples: int) -> StageSizes:
        """As ``stage_memory`` would give them."""
        run = Run(layout.engine, layout.tensor, layout.sequence_parallel, layout.expert, recompute, samples)
        kept_whole = replace(run, recompute="none") if recompute == "blocks" else run
        blocks = [
            self._block(kind_of_block(self.config.moe, index), run if index in stage.recomputed else kept_whole)
            for index in stage.blocks
        ]
        kept, forward, backward = 0.0, 0.0, 0.0
        for place, block in enumerate(blocks):
            forward, backward = max(forward, kept + block.alone[1]), max(backward, kept + block.alone[2])
            kept += block.more if place < len(blocks) - 1 else block.alone[0]
        buffers = max(block.alone[3] for block in blocks)
        if stage.last:
            head = self._around(run, False)
            forward, backward = max(forward, kept + head[1]), max(backward, kept + head[2])
            kept += head[0]
        if stage.first:
            embedders = self._around(run, True)
            forward, kept = forward + embedders[0], kept + embedders[0]
            backward = max(backward + embedders[0], embedders[2])
        memory = StageMemory(round(kept), round(forward), round(backward))
        return StageSizes(memory, round(buffers), self._whole(layout.data, samples) if stage.last else NONE)

    def _run_whole_step(self, data: int, samples: int) -> WholeStep:
        """Losses over all microbatches know of a layout only the data-parallel ranks."""
        if not objectives_of(self.config).whole_step:
            return NONE
        config = self.config.model_copy(update={"parallel": type(self.config.parallel)()})
        with pretended_groups(resolve_layout(config, data)) as groups:
            return whole_step(config, groups, self._batch(samples))

    def _linear_block(self, kind: object, run: Run) -> Block:
        """On few expert ranks by itself: peaks are the highest of several moments, some with the gradients of its
        experts, so a line through 2 and many ranks would lie above those between. Of more ranks, whose experts are
        few, linear in the rows that dispatch exchanges."""
        known = [n for n in divisors(self._most_experts()) if n <= RUN_EXPERTS or n == self._most_experts()]
        if run.expert in known:
            return self._of_samples(kind, run)
        ends = max(n for n in known if n < run.expert), min(n for n in known if n > run.expert)
        low, high = (self._of_samples(kind, replace(run, expert=n)) for n in ends)
        rows = [self._rows(expert) for expert in (ends[0], run.expert, ends[1])]
        share = (rows[1] - rows[0]) / (rows[2] - rows[0]) if rows[2] > rows[0] else 0.0
        return Block(low.alone + share * (high.alone - low.alone), low.more + share * (high.more - low.more))

    def _most_experts(self) -> int:
        return math.gcd(*self.config.moe.group_sizes)

    def _rows(self, expert: int) -> float:
        """That a rank receives for a token of its own."""
        moe = self.config.moe
        return routed_of(moe, 1.0, expert).rows_in + 1 / expert

    @cached_property
    def _run_at(self) -> tuple[int, int]:
        """Objectives may draw none of the first samples (``fraction``)."""
        rising = [0]
        for samples in RUN_AT:
            if self._tokens(samples) > self._tokens(rising[-1]):
                rising.append(samples)
            if len(rising) == 3:
                return rising[1], rising[2]
        raise ValueError(
            f"the objectives use too few of {RUN_AT[-1]} samples for a search to count their tokens; raise "
            f"objectives.NAME.fraction"
        )

    def _of_samples(self, kind: object, run: Run) -> Block:
        index = self.index[kind]
        few, many = (self._measured(replace(run, samples=n), index, index + 1, False, False) for n in self._run_at)
        share = self._tokens(run.samples) / self._tokens(self._run_at[0])
        more = self._more(index, replace(run, samples=self._run_at[0])) * share
        return Block(self._linear(run.samples, few, many), more)

    def _linear(self, samples: int, few: Bytes, many: Bytes) -> Bytes:
        """In the tokens, which not all samples have alike."""
        low, high = map(self._tokens, self._run_at)
        return few + (self._tokens(samples) - low) / (high - low) * (many - few)

    def _tokens(self, samples: int) -> float:
        counted = min(samples, COUNTED)
        if not samples:
            return 0.0
        return self._batch(counted).num_valid * samples / counted

    def _more(self, index: int, run: Run) -> float:
        """What the block keeps beside another one: without its input or output, which they share."""
        first = max(0, min(index - 1, self.config.model.num_layers - 2))
        other = first if first != index else first + 1
        if other >= self.config.model.num_layers:  # it is the only one
            return float(self._measured(run, index, index + 1, False, False)[0])
        pair = self._measured(run, first, first + 2, False, False)[0]
        return float(pair - self._measured(run, other, other + 1, False, False)[0])

    def _linear_around(self, run: Run, first: bool) -> Bytes:
        """Beside blocks: of the first stage what embedders keep, and its backward peak; of the last one what heads
        keep and the peaks of their passes above what its blocks keep."""
        index, expert = self._around_block(run.expert, first)
        run = replace(run, expert=expert, recompute="blocks" if first else "none")
        ends = []
        for samples in self._run_at:
            at = replace(run, samples=samples)
            block = self._measured(at, index, index + 1, False, False)
            whole = self._measured(at, index, index + 1, first, not first)
            above = whole - block[0]
            ends.append(np.array([above[0], above[1], whole[2] if first else above[2], 0.0]))
        return self._linear(run.samples, ends[0], ends[1])

    def _around_block(self, expert: int, first: bool) -> tuple[int, int]:
        """The block, and its expert ranks, to run embedders or heads with: a dense one, since experts' peaks would
        hide theirs; without any, an MoE block on as many ranks as the layout has, or on most."""
        for index in range(self.config.model.num_layers):
            if not is_sparse(self.config.moe, index):
                return index, 1
        return (0 if first else self.config.model.num_layers - 1), (
            expert if expert <= RUN_EXPERTS else self._most_experts()
        )

    def _run(self, run: Run, begin: int, end: int, first: bool, last: bool) -> Bytes:
        """A stage on fake tensors."""
        parallel = type(self.config.parallel)(
            engine=run.engine,
            tensor_parallel_size=run.tensor,
            sequence_parallel=run.sequence,
            expert_parallel_size=run.expert,
        )
        if run.tensor > 1:
            prepare()
        train = self.config.train.model_copy(update={"recompute": run.recompute})
        config = self.config.model_copy(update={"parallel": parallel, "train": train})
        with pretended_groups(resolve_layout(config, run.tensor * run.expert)) as groups:
            stage = Stage(begin, end, first, last)
            found = stage_memory(config, groups, stage, self._batch(run.samples), self.imbalance, self.device)
        memory = found.memory
        return np.array([memory.kept, memory.forward, memory.backward, found.buffers], dtype=float)
