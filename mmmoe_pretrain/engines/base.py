"""The protocol of an engine: what the training loop asks of megatron-core or DeepSpeed.

An engine owns gradient reduction, clipping and the optimizer step. Its state goes out and comes
in by logical parameter name, so that a checkpoint knows neither engine nor layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.checkpoint.state import ParameterState
from mmmoe_pretrain.moe.stats import RoutingStats


@dataclass(frozen=True)
class StepResult:
    """Means over the microbatches and data-parallel ranks of one optimizer step.

    ``routing`` holds sums over all of them. ``grad_norm`` is the norm before clipping, over
    dense and expert parameters together.
    """

    losses: dict[str, float]
    grad_norm: float
    tokens: int
    routing: tuple[RoutingStats, ...]


class Engine(Protocol):
    def step(self, microbatches: list[Batch], learning_rate: float) -> StepResult:
        """One optimizer step over the microbatches of this rank."""
        ...

    def export_state(self) -> dict[str, ParameterState]:
        """Every parameter with its optimizer moments, by logical name; views, not copies."""
        ...

    def import_state(self, state: dict[str, ParameterState], steps_done: int) -> None:
        """Take over what ``export_state`` of an engine with this layout gave."""
        ...
