"""Tasks that enter and leave during a run: what an update does to the parameters that they have alone.

Without weight a task gives its parameters gradients of zeros. The optimizer would still decay them, move them by
their momentum and let their moments fade, so they and their state are put back after each such update: a task that
comes back goes on where it was. Adam counts its updates for all parameters at once. One that gets its first gradient
at update t has moments (1 - beta1) g and (1 - beta2) g^2, which are not corrected any more, and would move by
(1 - beta1) / sqrt(1 - beta2) of the learning rate: 3.2 times too far at beta2 = 0.999. So its first step is divided
by that, and the moments begin as g and g^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from mmmoe_pretrain.config.optimizer import OptimizerConfig
from mmmoe_pretrain.engines.state import Held


@dataclass(frozen=True)
class Corrections:
    """How far off weight and moments of a first gradient are: what their values are divided by."""

    step: float
    first: float
    second: float

    @classmethod
    def at(cls, update: int, settings: OptimizerConfig) -> Corrections | None:
        """At Adam's ``update`` (from 1); None of another optimizer."""
        if settings.beta1 is None or settings.beta2 is None:
            return None
        first, second = ((1 - beta) / (1 - beta**update) for beta in (settings.beta1, settings.beta2))
        return cls(first / math.sqrt(second), first, second)


@torch.no_grad()
def put_back(now: Held, before: Held) -> None:
    """As if there had been no update."""
    for mine, kept in zip(now, before, strict=True):
        mine.copy_(kept)


@torch.no_grad()
def correct_first(now: Held, before: Held, by: Corrections) -> None:
    """Numbers that had no gradient before this update begin as those of a new run do. Of both: the weight, then
    Adam's two moments."""
    weight, first, second = now[:3]
    new = before[2] == 0
    weight.copy_(torch.where(new, before[0] + (weight - before[0]) / by.step, weight))
    first.copy_(torch.where(new, first / by.first, first))
    second.copy_(torch.where(new, second / by.second, second))
