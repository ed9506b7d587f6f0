"""Statistics of routing: sums over tokens, from which losses and telemetry are computed (``loss_sums.gather_stats``).

Sums, so that ranks, microbatches and steps can be added up. Padding is never among the tokens.
Shapes: M modalities, X tasks, E experts (those without computation included), K choices, C combinations of modalities
that have an expert of their own.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmoe_pretrain.config.base import StreamNames

REDUCED = (
    "probability_MXE", "entropy_MX", "z_MX", "counts_MXE", "tokens_MX", "dropped_MX", "load_ME", "sequence_balance",
    "combination_C3",
)  # fmt: skip


@dataclass(frozen=True)
class RoutingStats:
    """Sums over tokens by (modality, task), of this rank until ``losses.reduce_stats`` has run.

    ``probability_MXE``, ``entropy_MX`` (nats), ``z_MX`` (logsumexp^2), ``load_ME`` (smooth load of
    V-MoE; zeros unless its loss is on), ``sequence_balance`` ([2]: sum over segments of
    E sum_e f_e P_e, and the number of segments; zeros unless that scope is on) and the first column of
    ``combination_C3`` (by combination: the sum over its tokens of -log p of its expert, their number, and how
    many have that expert as first choice) carry gradients; the others are counts as floats.
    ``counts_MXE`` are assignments (a token counts K times) before any drop.

    ``coactivation_MEE`` (how often two experts served one token; symmetric, diagonal 0) and ``lending``
    (``lending.Shares.summary``, where it is on) stay this rank's own: they are reduced where they are
    logged. ``orthogonality`` is of the router's weights, the same on every rank. ``names``: of the M modalities,
    X tasks and C combinations. ``allowed_ME`` is True where a modality may choose an expert.
    """

    probability_MXE: Tensor
    entropy_MX: Tensor
    z_MX: Tensor
    counts_MXE: Tensor
    tokens_MX: Tensor
    dropped_MX: Tensor
    load_ME: Tensor
    sequence_balance: Tensor
    combination_C3: Tensor
    coactivation_MEE: Tensor
    orthogonality: Tensor
    names: StreamNames
    allowed_ME: Tensor
    layer: int = 0
    lending: Tensor | None = None

    @property
    def probability_ME(self) -> Tensor:
        return self.probability_MXE.sum(1)

    @property
    def entropy_M(self) -> Tensor:
        return self.entropy_MX.sum(1)

    @property
    def z_M(self) -> Tensor:
        return self.z_MX.sum(1)

    @property
    def counts_ME(self) -> Tensor:
        return self.counts_MXE.sum(1)

    @property
    def tokens_M(self) -> Tensor:
        return self.tokens_MX.sum(1)

    @property
    def dropped_M(self) -> Tensor:
        return self.dropped_MX.sum(1)

    @property
    def reach_ME(self) -> Tensor:
        """1 where a modality may choose an expert, else 0."""
        return self.allowed_ME.to(self.counts_MXE.dtype)

    def flatten(self) -> Tensor:
        """All sums that are reduced over ranks in one vector; ``unflatten`` undoes it."""
        return torch.cat([getattr(self, name).reshape(-1) for name in REDUCED])

    def unflatten(self, vector: Tensor) -> RoutingStats:
        """Stats of this layer and shape with the values of ``vector``."""
        parts = vector.split([getattr(self, name).numel() for name in REDUCED])
        named = {name: part.view_as(getattr(self, name)) for name, part in zip(REDUCED, parts, strict=True)}
        return dataclasses.replace(self, **named)

    def detach(self) -> RoutingStats:
        """The same values without gradients."""
        names = (*REDUCED, "coactivation_MEE", "orthogonality")
        return dataclasses.replace(self, **{name: getattr(self, name).detach() for name in names})

    def __add__(self, other: RoutingStats) -> RoutingStats:
        """The sum of two microbatches of the same layer."""
        assert self.layer == other.layer, (self.layer, other.layer)
        names = (*REDUCED, "coactivation_MEE", *(() if self.lending is None else ("lending",)))
        summed = {name: getattr(self, name) + getattr(other, name) for name in names}
        return dataclasses.replace(self, **summed)
