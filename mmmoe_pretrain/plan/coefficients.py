"""Memory of a microbatch in any pipeline stage of any layout, from single blocks that were run on fake tensors.

A stage keeps the sum of what its blocks keep, and its passes peak in one of them. One block of each kind is run for
each number of tensor ranks, recomputation and engine, at two numbers of samples and at few of expert ranks. All
else is linear: in the tokens, and in the rows that dispatch exchanges. ``activations.py`` runs whole stages;
tests/plan/test_closed.py holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.megatron import prepare
from mmmoe_pretrain.models.block import kind_of_block
from mmmoe_pretrain.parallel.degrees import Layout
from mmmoe_pretrain.parallel.layout import resolve_layout
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.plan.activations import BALANCED, Device, Imbalance, StageMemory, StageSizes, stage_memory
from mmmoe_pretrain.plan.build import pretended_groups
from mmmoe_pretrain.plan.communication import expected_routed
from mmmoe_pretrain.plan.workload import full_batch

Bytes = np.ndarray  # kept, forward, backward, buffers
RUN_AT = (2, 4)  # samples
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
        self._batch = lru_cache(maxsize=None)(lambda samples: full_batch(config, samples))

    def sizes(self, layout: Layout, recompute: str, stage: Stage, samples: int) -> StageSizes:
        """As ``stage_memory`` would give them."""
        run = Run(layout.engine, layout.tensor, layout.sequence_parallel, layout.expert, recompute, samples)
        blocks = [self._block(kind_of_block(self.config.moe, index), run) for index in stage.blocks]
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
        return StageSizes(StageMemory(round(kept), round(forward), round(backward)), round(buffers))

    def _linear_block(self, kind: object, run: Run) -> Block:
        """Between two numbers of expert ranks, linear in the rows that dispatch exchanges; one rank has none."""
        if run.expert <= 2:
            return self._of_samples(kind, run)
        low, high = (self._of_samples(kind, replace(run, expert=n)) for n in (2, self._most_experts()))
        rows = [self._rows(expert) for expert in (2, run.expert, self._most_experts())]
        share = (rows[1] - rows[0]) / (rows[2] - rows[0]) if rows[2] > rows[0] else 0.0
        return Block(low.alone + share * (high.alone - low.alone), low.more + share * (high.more - low.more))

    def _most_experts(self) -> int:
        return min(self.config.moe.group_sizes)

    def _rows(self, expert: int) -> float:
        """That a rank receives for a token of its own."""
        moe = self.config.moe
        return expected_routed(1.0, moe.experts_per_token, moe.num_experts, expert).rows_in + 1 / expert

    def _of_samples(self, kind: object, run: Run) -> Block:
        index = self.index[kind]
        few, many = (self._measured(replace(run, samples=n), index, index + 1, False, False) for n in RUN_AT)
        share = self._tokens(run.samples) / self._tokens(RUN_AT[0])
        more = self._more(index, replace(run, samples=RUN_AT[0])) * share
        return Block(self._linear(run.samples, few, many), more)

    def _linear(self, samples: int, few: Bytes, many: Bytes) -> Bytes:
        """In the tokens, which not all samples have alike."""
        low, high = map(self._tokens, RUN_AT)
        return few + (self._tokens(samples) - low) / (high - low) * (many - few)

    def _tokens(self, samples: int) -> float:
        counted = min(samples, COUNTED)
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
        expert = 1 if run.expert == 1 else self._most_experts()  # few on a rank: small gradients beside those around
        run = replace(run, expert=expert, recompute="blocks" if first else "none")
        index = 0 if first else self.config.model.num_layers - 1
        ends = []
        for samples in RUN_AT:
            at = replace(run, samples=samples)
            block = self._measured(at, index, index + 1, False, False)
            whole = self._measured(at, index, index + 1, first, not first)
            above = whole - block[0]
            ends.append(np.array([above[0], above[1], whole[2] if first else above[2], 0.0]))
        return self._linear(run.samples, ends[0], ends[1])

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
