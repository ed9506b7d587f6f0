"""Statistics of routing: sums over tokens, from which losses and telemetry are computed.

Sums, so that ranks, microbatches and steps can be added up. Padding is never among the tokens.
Shapes: M modalities, X tasks, E experts (those without computation included), K choices.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.moe.tokens import TokenInfo

REDUCED = (
    "probability_MXE", "entropy_MX", "z_MX", "counts_MXE", "tokens_MX", "dropped_MX", "load_ME", "sequence_balance",
)  # fmt: skip


@dataclass(frozen=True)
class RoutingStats:
    """Sums over tokens by (modality, task), of this rank until ``losses.reduce_stats`` has run.

    ``probability_MXE``, ``entropy_MX`` (nats), ``z_MX`` (logsumexp^2), ``load_ME`` (smooth load of
    V-MoE; zeros unless its loss is on) and ``sequence_balance`` ([2]: sum over segments of
    E sum_e f_e P_e, and the number of segments; zeros unless that scope is on) carry gradients; the
    others are counts as floats. ``counts_MXE`` are assignments (a token counts K times) before any drop.

    ``coactivation_MEE`` (how often two experts served one token; symmetric, diagonal 0) stays this
    rank's own: it is reduced where it is logged. ``orthogonality`` is of the router's weights, the same
    on every rank. ``names``: of the M modalities and X tasks. ``allowed_ME`` is True where a modality may choose an
    expert; None lets each choose all.
    """

    probability_MXE: Tensor
    entropy_MX: Tensor
    z_MX: Tensor
    counts_MXE: Tensor
    tokens_MX: Tensor
    dropped_MX: Tensor
    load_ME: Tensor
    sequence_balance: Tensor
    coactivation_MEE: Tensor
    orthogonality: Tensor
    names: StreamNames
    layer: int = 0
    allowed_ME: Tensor | None = None

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
    def num_experts(self) -> int:
        return self.counts_MXE.shape[-1]

    @property
    def reach_ME(self) -> Tensor:
        """1 where a modality may choose an expert, else 0."""
        if self.allowed_ME is None:
            return self.counts_MXE.new_ones(self.counts_MXE.shape[0], self.num_experts)
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
        summed = {name: getattr(self, name) + getattr(other, name) for name in (*REDUCED, "coactivation_MEE")}
        return dataclasses.replace(self, **summed)


def gather_stats(
    logits_nE: Tensor,
    log_p_nE: Tensor,
    ids_nK: Tensor,
    kept_nK: Tensor,
    tokens: TokenInfo,
    chosen_nK: Tensor | None = None,
) -> RoutingStats:
    """Sums over this rank's tokens. ``log_p_nE`` is the log of the routing distribution;
    ``chosen_nK`` is False where an entry of ``ids_nK`` is not an assignment at all (expert choice)."""
    num_experts, M, X = logits_nE.shape[-1], len(tokens.names.modalities), len(tokens.names.tasks)
    p_nE = log_p_nE.exp()
    cell_n = tokens.modality_ids_n * X + tokens.task_ids_n
    member_Cn = F.one_hot(cell_n, M * X).to(p_nE.dtype).t()
    chosen = torch.ones_like(ids_nK, dtype=p_nE.dtype) if chosen_nK is None else chosen_nK.to(p_nE.dtype)
    counts = _count(cell_n[:, None] * num_experts + ids_nK, chosen, M * X * num_experts)
    dropped_nK = ~kept_nK if chosen_nK is None else chosen_nK & ~kept_nK
    return RoutingStats(
        probability_MXE=(member_Cn @ p_nE).view(M, X, num_experts),
        entropy_MX=-(member_Cn @ (p_nE * log_p_nE).sum(-1)).view(M, X),
        z_MX=(member_Cn @ logits_nE.logsumexp(-1).square()).view(M, X),
        counts_MXE=counts.view(M, X, num_experts),
        tokens_MX=member_Cn.sum(1).view(M, X),
        dropped_MX=(member_Cn @ dropped_nK.sum(-1).to(p_nE.dtype)).view(M, X),
        load_ME=p_nE.new_zeros(M, num_experts),
        sequence_balance=p_nE.new_zeros(2),
        coactivation_MEE=coactivation(ids_nK, kept_nK, tokens.modality_ids_n, M, num_experts),
        orthogonality=p_nE.new_zeros(()),
        names=tokens.names,
    )


def coactivation(
    ids_nK: Tensor, kept_nK: Tensor, modality_ids_n: Tensor, num_modalities: int, num_experts: int
) -> Tensor:
    """[M, E, E]: tokens that both experts served."""
    M, top_k = num_modalities, ids_nK.shape[-1]
    if top_k < 2:
        return torch.zeros(M, num_experts, num_experts, device=ids_nK.device)
    if top_k * (top_k - 1) > 2 * num_experts:  # expert choice has E entries a token: too many pairs to list
        served_nE = torch.zeros(ids_nK.shape[0], num_experts, device=ids_nK.device)
        served_nE.scatter_(1, ids_nK, kept_nK.float())
        of_modality = [served_nE * (modality_ids_n == m)[:, None] for m in range(M)]
        together_MEE = torch.stack([rows_nE.t() @ rows_nE for rows_nE in of_modality])
        return together_MEE * (1 - torch.eye(num_experts, device=ids_nK.device))
    first, second = torch.triu_indices(top_k, top_k, 1, device=ids_nK.device)
    a, b = ids_nK[:, first], ids_nK[:, second]
    cell = (modality_ids_n[:, None] * num_experts + a) * num_experts + b
    both = (kept_nK[:, first] & kept_nK[:, second]).float()
    pairs = _count(cell, both, M * num_experts**2).view(M, num_experts, num_experts)
    return pairs + pairs.transpose(1, 2)


def _count(cells: Tensor, weights: Tensor, size: int) -> Tensor:
    """[size]: the sum of the weights in each cell. ``bincount`` would make a GPU's host wait for it."""
    return weights.new_zeros(size).scatter_add_(0, cells.reshape(-1), weights.reshape(-1))
