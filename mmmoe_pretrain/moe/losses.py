"""Auxiliary losses of routing: pure functions of sums that were reduced over all ranks.

Since the sums are global, one process and any data-parallel layout give the same losses.
p_bar_m is the mean routing distribution of modality m, H the entropy in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mmmoe_pretrain.batch import MODALITY_ID
from mmmoe_pretrain.config import RoutingLossConfig
from mmmoe_pretrain.moe.routing import RoutingStats
from mmmoe_pretrain.parallel.collectives import all_reduce_sum
from mmmoe_pretrain.parallel.groups import Group


def reduce_stats(stats: Sequence[RoutingStats], group: Group) -> tuple[RoutingStats, ...]:
    """Each layer's sums over all ranks of ``group``, by one differentiable reduction."""
    if not stats:
        return ()
    total = all_reduce_sum(torch.stack([layer.flatten() for layer in stats]), group)
    return tuple(layer.unflatten(row) for layer, row in zip(stats, total.unbind(0), strict=True))


def local_entropy(stats: RoutingStats, modality: int) -> Tensor:
    """Mean over the modality's tokens of H(p(x)); small when single tokens route confidently.

    LIMoE, arXiv 2206.02770, section 2.2.
    """
    return stats.entropy_M[modality] / stats.tokens_M[modality].clamp(min=1)


def global_entropy(stats: RoutingStats, modality: int, min_experts: float | None) -> Tensor:
    """-H(p_bar_m), or max(0, log(min_experts) - H(p_bar_m)): at least that many experts in use.

    LIMoE, arXiv 2206.02770, section 2.2 and its soft threshold.
    """
    entropy = marginal_entropy(stats, modality)
    if min_experts is None:
        return -entropy
    return (math.log(min_experts) - entropy).clamp(min=0)


def marginal_entropy(stats: RoutingStats, modality: int) -> Tensor:
    """H(p_bar_m); 0 for a modality without tokens."""
    p_E = stats.probability_ME[modality] / stats.tokens_M[modality].clamp(min=1)
    return -torch.xlogy(p_E, p_E.clamp(min=torch.finfo(p_E.dtype).tiny)).sum()


def balance(stats: RoutingStats) -> Tensor:
    """E * sum_e f_e P_e over all tokens (Switch Transformer, arXiv 2101.03961); 1 when even."""
    tokens = stats.tokens_M.sum().clamp(min=1)
    counts_E = stats.counts_ME.sum(0)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return counts_E.numel() * (share_E * stats.probability_ME.sum(0) / tokens).sum()


def z_loss(stats: RoutingStats) -> Tensor:
    """Mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906)."""
    return stats.z_sum / stats.tokens_M.sum().clamp(min=1)


def layer_losses(stats: RoutingStats, config: RoutingLossConfig) -> dict[str, Tensor]:
    """The weighted terms of one layer, by name; entropies are means over the modalities present."""
    losses: dict[str, Tensor] = {}
    if config.balance:
        losses["balance"] = config.balance * balance(stats)
    if config.z:
        losses["z"] = config.z * z_loss(stats)
    if not (config.local_entropy or config.global_entropy):
        return losses
    present_M = (stats.tokens_M > 0).to(stats.tokens_M.dtype)
    taking_part = [MODALITY_ID[name] for name in config.entropy_modalities]
    share_M = present_M / present_M[taking_part].sum().clamp(min=1)
    for name in config.entropy_modalities:
        m = MODALITY_ID[name]
        if config.local_entropy:
            losses[f"local_entropy/{name}"] = config.local_entropy * share_M[m] * local_entropy(stats, m)
        if config.global_entropy:
            term = global_entropy(stats, m, config.min_experts.get(name))
            losses[f"global_entropy/{name}"] = config.global_entropy * share_M[m] * term
    return losses


def routing_losses(stats: Sequence[RoutingStats], config: RoutingLossConfig) -> dict[str, Tensor]:
    """The weighted terms by name, means over the layers; ``stats`` are reduced ones."""
    layers = [layer_losses(layer, config) for layer in stats]
    if not layers:
        return {}
    return {name: torch.stack([layer[name] for layer in layers]).mean() for name in layers[0]}
