"""All legal layouts of a config, ranked by closed forms: parameters and held bytes (exact, ``closed.py``), the memory
of microbatches (``coefficients.py``) and time (``time.py``)."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.costs import model_costs
from mmmoe_pretrain.plan.activations import Imbalance
from mmmoe_pretrain.plan.build import Build
from mmmoe_pretrain.plan.closed import ClosedForm
from mmmoe_pretrain.plan.coefficients import Coefficients
from mmmoe_pretrain.plan.layouts import Candidate, Choice, legal, neighbours, resolve
from mmmoe_pretrain.plan.memory import held_bytes
from mmmoe_pretrain.plan.peak import rank_memory
from mmmoe_pretrain.plan.report import Asked, Fullest, values_of
from mmmoe_pretrain.plan.tables import size
from mmmoe_pretrain.plan.time import step_time

log = logging.getLogger(__name__)
LISTED = 5


@dataclass(frozen=True)
class Ranked:
    """``seconds`` of a step; ``memory`` of the fullest rank at its peak."""

    candidate: Candidate
    seconds: float
    memory: float


class Search:
    """The layouts of one config on a number of GPUs."""

    def __init__(self, asked: Asked, config: RunConfig) -> None:
        self.asked, self.config = asked, config
        train = config.train.model_copy(update={"profile": None})  # of ranks that single blocks do not have
        blocks = config.model_copy(update={"train": train})
        self.closed, self.costs = ClosedForm(blocks), model_costs(blocks)
        self.activations = Coefficients(blocks, Imbalance(asked.imbalance, asked.imbalance), asked.device)
        self._held: dict[Choice, int] = {}

    def by_time(self) -> tuple[list[tuple[float, Candidate]], int]:
        """Layouts that could fit by what they hold from step to step, the fastest first; and how many are legal."""
        timed, count = [], 0
        for candidate in legal(self.config, self.asked.gpus):
            count += 1
            if self.held(candidate) <= self.asked.machine.memory:
                timed.append((self.seconds(self.built(candidate)), candidate))
        return sorted(timed, key=lambda each: each[0]), count

    def fitting(self, timed: list[tuple[float, Candidate]]) -> Iterator[Ranked]:
        """Those whose peak fits, in their order."""
        for seconds, candidate in timed:
            memory = self.fullest(candidate).memory.total
            if memory <= self.asked.machine.memory:
                yield Ranked(candidate, seconds, memory)

    def built(self, candidate: Candidate) -> Build:
        return self.closed.build(candidate.config, candidate.layout)

    def seconds(self, made: Build) -> float:
        """Of a step."""
        return step_time(made, self.asked.machine, imbalance=self.asked.imbalance, costs=self.costs).seconds

    def held(self, candidate: Candidate) -> int:
        """Bytes of the fullest rank from step to step; recomputation does not change them."""
        key = replace(candidate.choice, recompute="none")
        if key not in self._held:
            made, state = self.built(candidate), self.config.optimizer.state
            self._held[key] = max(held_bytes(made.layout, rank.parameters, state).total for rank in made.ranks)
        return self._held[key]

    def fullest(self, candidate: Candidate) -> Fullest:
        """As ``report.fullest``, from coefficients. Of ranks that hold the same the first one has most microbatches
        in flight."""
        made = self.built(candidate)
        first: dict[object, int] = {}
        for rank in made.ranks:
            alike = tuple((s.first, s.last, len(s.blocks), s.first_block % self._period) for s in rank.stages)
            first.setdefault(alike, rank.pipeline_rank)
        found = []
        for number in first.values():
            rank = made.ranks[number]
            sizes = [
                self.activations.sizes(made.layout, candidate.choice.recompute, stage, candidate.samples)
                for stage in rank.stages
            ]
            found.append(Fullest(number, rank_memory(made, rank, sizes, self.asked.device)))
        return max(found, key=lambda each: each.memory.total)

    @property
    def _period(self) -> int:
        """Blocks after which their kinds repeat."""
        return self.config.model.num_layers if self.config.moe.layers else self.config.moe.every

    def why_not(self, best: Ranked) -> Iterator[tuple[Choice, str]]:
        """The layouts one step from the best one that are refused, do not fit or are slower, and why."""
        for choice in neighbours(best.candidate.choice, self.asked.gpus):
            try:
                candidate = resolve(self.config, choice, self.asked.gpus)
            except ValueError as error:
                yield choice, f"refused: {error}"
                continue
            over = self.fullest(candidate).memory.total - self.asked.machine.memory
            if over > 0:
                yield choice, f"does not fit: {size(over)} too much"
                continue
            slower = self.seconds(self.built(candidate)) / best.seconds - 1
            yield choice, f"fits, and a step takes {slower:.1%} longer"


def search(asked: Asked, config: RunConfig, assumptions: list[str]) -> dict[str, Any]:
    """The fastest layouts that fit, each planned by the real build, and why those next to the best one are worse.

    Raises ValueError where none fits or none is legal.
    """
    looking = Search(asked, config)
    frozen_before = gc.get_freeze_count()  # by the caller, for whom it stays so
    gc.collect()
    gc.freeze()  # what is alive stays so: runs on fake tensors collect garbage often
    try:
        log.info("search: computing the step time of all legal layouts")
        timed, count = looking.by_time()
        log.info("search: %d legal layouts, of which %d can fit; planning the fastest", count, len(timed))
        planned = ((each, values_of(asked, each.candidate.config, assumptions)) for each in looking.fitting(timed))
        ranked = list(islice((each for each in planned if each[1]["memory"]["fits"]), LISTED))
        if not ranked:
            raise ValueError(nothing_fits(looking, count))
        beside = [{"layout": str(choice), "why": why} for choice, why in looking.why_not(ranked[0][0])]
    finally:
        if not frozen_before:
            gc.unfreeze()
    listed = [
        {"overrides": each.candidate.choice.overrides, "closed": {"seconds": each.seconds, "memory": each.memory},
         **values}
        for each, values in ranked
    ]  # fmt: skip
    return {"config": config.name, "gpus": asked.gpus, "gpu": asked.machine.name, "legal": count,
            "held_fits": len(timed), "best": listed, "beside": beside}  # fmt: skip


def nothing_fits(looking: Search, count: int) -> str:
    """The problem and the remedy."""
    config, asked = looking.config, looking.asked
    where = f"{config.name} on {asked.gpus} x {asked.machine.name}"
    if not count:
        train = config.train
        return (
            f"{where}: no layout is possible: data x tensor x pipeline ranks must be {asked.gpus}, and "
            f"train.global_batch_size {train.global_batch_size} a multiple of train.num_microbatches "
            f"{train.num_microbatches} x data ranks; plan for another number of GPUs, or change these settings"
        )
    least = min(looking.held(candidate) for candidate in legal(config, asked.gpus))
    return (
        f"{where}: none of {count} legal layouts fits {size(asked.machine.memory)}; weights, gradients and "
        f"optimizer state alone need {size(least)} or more; use more GPUs, more train.num_microbatches or a "
        f"smaller model"
    )
