"""The protocol of an engine: what the training loop asks of megatron-core or DeepSpeed.

An engine owns gradient reduction, clipping and the optimizer step. Its state goes out and comes
in by logical parameter name, so that a checkpoint knows neither engine nor layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint.sharded import ShardedState
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.objectives.counts import StepCounts


@dataclass(frozen=True)
class StepResult:
    """Of one optimizer step over all its microbatches and data-parallel ranks, equal on every rank. The gradient is
    that of ``losses["total"]``.

    ``routing`` holds sums over all of them, of the mixtures on this rank's stages. ``grad_norm`` is the
    norm before clipping, over all parameters of the model, experts included.
    """

    losses: dict[str, float]
    grad_norm: float
    counts: StepCounts  # that the losses were divided by
    routing: tuple[RoutingStats, ...]
    skipped: bool = False  # the loss or the gradient was not finite: weights, moments and routers are as before
    loss_scale: float = 1.0  # that the gradient was computed with (fp16)

    @property
    def tokens(self) -> int:
        return self.counts.tokens


@dataclass(frozen=True)
class LossScale:
    """The state of fp16's dynamic loss scale."""

    scale: float
    good_steps: int  # without overflow since the last change
    hysteresis: int  # overflows left before the scale halves


@dataclass(frozen=True)
class Progress:
    """What an engine counts, saved in a checkpoint's ``meta.json``. Steps that were left out are steps, but no
    updates: Adam's bias correction counts updates."""

    steps: int
    updates: int
    loss_scale: LossScale | None = None

    @property
    def scale(self) -> float:
        """That losses are multiplied by."""
        return 1.0 if self.loss_scale is None else self.loss_scale.scale

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progress:
        scale = value["loss_scale"]
        return cls(value["steps"], value["updates"], None if scale is None else LossScale(**scale))


class Engine(Protocol):
    @property
    def models(self) -> Sequence[nn.Module]:
        """The stages of this rank, with the weights that they compute with."""
        ...

    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over the microbatches of this rank."""
        ...

    def export_state(self) -> ShardedState:
        """What this rank holds of each parameter and its optimizer moments, by logical name; views of live
        memory, not copies."""
        ...

    def import_state(self, state: ShardedState, progress: Progress) -> None:
        """Take over a state with the same pieces as ``export_state`` gives, and go on after ``progress.steps``."""
        ...

    def progress(self) -> Progress:
        """How far this engine is."""
        ...
