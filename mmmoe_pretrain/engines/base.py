"""The protocol of an engine: what the training loop asks of megatron-core or DeepSpeed.

An engine owns gradient reduction, clipping and the optimizer step. Its state goes out and comes
in by logical parameter name, so that a checkpoint knows neither engine nor layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint.sharded import ShardedState
from mmmoe_pretrain.moe.stats import RoutingStats


@dataclass(frozen=True)
class StepResult:
    """Means over the microbatches and data-parallel ranks of one optimizer step, equal on every rank.

    ``routing`` holds sums over all of them, of the mixtures on this rank's stages. ``grad_norm`` is the
    norm before clipping, over all parameters of the model, experts included.
    """

    losses: dict[str, float]
    grad_norm: float
    tokens: int
    routing: tuple[RoutingStats, ...]


class Engine(Protocol):
    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over the microbatches of this rank."""
        ...

    def export_state(self) -> ShardedState:
        """What this rank holds of each parameter and its optimizer moments, by logical name; views of live
        memory, not copies."""
        ...

    def import_state(self, state: ShardedState, steps_done: int) -> None:
        """Take over a state with the same pieces as ``export_state`` gives."""
        ...
