"""The layouts of a config that ``parallel/layout.py`` accepts on a number of ranks, and those next to one.

The recipe stays as it is: global batch, microbatches, precision, model. ``train.num_microbatches`` is part of it,
since some losses are taken over a microbatch. All arithmetic, in seconds for thousands of layouts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.engines import ENGINES
from mmmoe_pretrain.data.order.assign import microbatch_size
from mmmoe_pretrain.parallel.degrees import Layout, divisors
from mmmoe_pretrain.parallel.layout import resolve_layout

RECOMPUTE = ("none", "experts", "blocks")  # train.recompute, from the most memory to the least
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Choice:
    """What a search varies, by the keys of ``parallel`` and ``train.recompute``."""

    engine: str
    tensor: int
    sequence_parallel: bool
    pipeline: int
    virtual: int
    expert: int
    zero_stage: int
    recompute: str

    @staticmethod
    def of(config: RunConfig, layout: Layout) -> Choice:
        """The layout that ``config`` has."""
        return Choice(
            layout.engine, layout.tensor, layout.sequence_parallel, layout.pipeline, layout.virtual_pipeline,
            layout.expert, layout.zero_stage, config.train.recompute,
        )  # fmt: skip

    @property
    def overrides(self) -> tuple[str, ...]:
        """As ``mmmoe train`` takes them."""
        return (
            f"parallel.engine={self.engine}",
            f"parallel.tensor_parallel_size={self.tensor}",
            f"parallel.sequence_parallel={str(self.sequence_parallel).lower()}",
            f"parallel.pipeline_parallel_size={self.pipeline}",
            f"parallel.virtual_pipeline_size={self.virtual}",
            f"parallel.expert_parallel_size={self.expert}",
            f"parallel.zero_stage={self.zero_stage}",
            f"train.recompute={self.recompute}",
        )

    def apply(self, config: RunConfig) -> RunConfig:
        """``config`` with this layout. Settings that only another engine or ZeRO stage reads are left out."""
        parallel, engine = config.parallel, ENGINES[self.engine]
        reduce = parallel.overlap_grad_reduce and "overlap_grad_reduce" in engine.overlap
        gather = parallel.overlap_param_gather and "overlap_param_gather" in engine.overlap
        offload = engine.offload.get(parallel.offload_optimizer)
        update = {
            "engine": self.engine,
            "data_parallel_size": "auto",
            "tensor_parallel_size": self.tensor,
            "sequence_parallel": self.sequence_parallel,
            "pipeline_parallel_size": self.pipeline,
            "virtual_pipeline_size": self.virtual,
            "expert_parallel_size": self.expert,
            "expert_tensor_parallel_size": "auto",
            "zero_stage": self.zero_stage,
            "overlap_grad_reduce": reduce,
            "overlap_param_gather": gather and reduce and self.zero_stage == 1,
            "deepspeed": parallel.deepspeed if engine.settings == "deepspeed" else {},
            "offload_optimizer": parallel.offload_optimizer if offload and self.zero_stage else "none",
        }
        train = config.train.model_copy(update={"recompute": self.recompute})
        return config.model_copy(update={"parallel": parallel.model_copy(update=update), "train": train})

    def __str__(self) -> str:
        sequence = " + sequence" if self.sequence_parallel else ""
        stages = f" x {self.virtual} virtual" if self.virtual > 1 else ""
        return (
            f"tensor {self.tensor}{sequence}, pipeline {self.pipeline}{stages}, expert {self.expert}, "
            f"{self.engine} ZeRO-{self.zero_stage}, recompute {self.recompute}"
        )


@dataclass(frozen=True)
class Candidate:
    """A choice that works: the config with it, and its layout."""

    choice: Choice
    config: RunConfig
    layout: Layout

    @cached_property
    def samples(self) -> int:
        """Of a microbatch on one data-parallel rank."""
        return microbatch_size(self.config, self.layout.data)


def resolve(config: RunConfig, choice: Choice, world_size: int) -> Candidate:
    """Raises ValueError where ``parallel/layout.py`` or the batch sampler refuses it."""
    chosen = choice.apply(config)
    layout = resolve_layout(chosen, world_size)
    microbatch_size(chosen, layout.data)
    return Candidate(choice, chosen, layout)


def legal(config: RunConfig, world_size: int) -> Iterator[Candidate]:
    """Every layout of ``config`` on so many ranks."""
    for choice in _choices(config, world_size):
        try:
            yield resolve(config, choice, world_size)
        except ValueError:
            continue


def _choices(config: RunConfig, world_size: int) -> Iterator[Choice]:
    """Those that a look at one degree does not exclude."""
    layers, experts = config.model.num_layers, config.moe.group_sizes
    for tensor in divisors(world_size):
        for pipeline in (n for n in divisors(world_size // tensor) if n <= layers):
            data = world_size // (tensor * pipeline)
            spread = [n for n in divisors(data) if not any(count % n for count in experts)]
            for engine, able in ENGINES.items():
                if pipeline > 1 and not able.pipeline:
                    continue
                virtual_sizes = range(1, layers // pipeline + 1) if pipeline > 1 else (1,)
                for virtual in virtual_sizes:
                    for sequence in (False, True) if tensor > 1 else (False,):
                        for zero in able.zero_stages:
                            for expert in spread:
                                for recompute in RECOMPUTE:
                                    yield Choice(engine, tensor, sequence, pipeline, virtual, expert, zero, recompute)


def neighbours(choice: Choice, world_size: int) -> Iterator[Choice]:
    """Choices that differ in one degree by one step, possible or not."""
    for key in ("tensor", "pipeline", "expert"):
        steps = divisors(world_size)
        at = steps.index(getattr(choice, key))
        for value in {steps[max(0, at - 1)], steps[min(len(steps) - 1, at + 1)]} - {steps[at]}:
            changed: dict[str, Any] = {key: value}
            yield replace(choice, **changed)
    for virtual in {max(1, choice.virtual - 1), choice.virtual + 1} - {choice.virtual}:
        yield replace(choice, virtual=virtual)
    yield replace(choice, sequence_parallel=not choice.sequence_parallel)
    for stage in ZERO_STAGES:
        if abs(stage - choice.zero_stage) == 1:
            yield replace(choice, zero_stage=stage)
    for engine in ENGINES:
        if engine != choice.engine:
            yield replace(choice, engine=engine)
    for recompute in RECOMPUTE:
        if recompute != choice.recompute:
            yield replace(choice, recompute=recompute)
