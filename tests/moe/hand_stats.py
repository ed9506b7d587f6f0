"""Statistics of routing with the sums written down, all of the first task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmmoe_pretrain.moe.stats import RoutingStats
from tests.moe.routing_inputs import NAMES

Rows = Sequence[Sequence[float]]


def hand_stats(
    probability_ME: Rows,
    counts_ME: Rows,
    tokens_M: Sequence[float],
    entropy_M: Sequence[float] = (0, 0, 0),
    z_M: Sequence[float] = (0, 0, 0),
    load_ME: Rows | None = None,
    sequence: Sequence[float] = (0, 0),
    orthogonality: float = 0.0,
    allowed_ME: Rows | None = None,
) -> RoutingStats:
    """Rows are image, audio, text."""
    probability_MXE, counts_MXE = _of_first_task(probability_ME), _of_first_task(counts_ME)
    experts = probability_MXE.shape[-1]
    return RoutingStats(
        probability_MXE=probability_MXE,
        entropy_MX=_of_first_task(entropy_M),
        z_MX=_of_first_task(z_M),
        counts_MXE=counts_MXE,
        tokens_MX=_of_first_task(tokens_M),
        dropped_MX=torch.zeros(3, len(NAMES.tasks)),
        load_ME=torch.zeros(3, experts) if load_ME is None else torch.tensor(load_ME, dtype=torch.float32),
        sequence_balance=torch.tensor(sequence, dtype=torch.float32),
        coactivation_MEE=torch.zeros(3, experts, experts),
        orthogonality=torch.tensor(orthogonality),
        names=NAMES,
        allowed_ME=None if allowed_ME is None else torch.tensor(allowed_ME).bool(),
    )


def _of_first_task(rows: Rows | Sequence[float]) -> Tensor:
    values = torch.tensor(rows, dtype=torch.float32)
    return torch.stack([values] + [torch.zeros_like(values)] * (len(NAMES.tasks) - 1), dim=1)
