"""Auxiliary losses of routing: pure functions of sums that were reduced over all ranks.

Since the sums are global, one process and any data-parallel layout give the same losses, and padding,
which never reaches a router, is in none of them. Over the microbatches of an optimizer step the loss
is the mean of theirs, weighted by their tokens. p_bar_m is the mean routing distribution of modality
m, H the entropy in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmmoe_pretrain.config.moe import RoutingLossConfig
from mmmoe_pretrain.moe.balance import ALL, balance, importance, load, sequence_balance
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.collectives import all_reduce_sum
from mmmoe_pretrain.parallel.groups import Group


def reduce_stats(stats: Sequence[RoutingStats], group: Group) -> tuple[RoutingStats, ...]:
    """Each layer's sums over all ranks of ``group``, by one differentiable reduction."""
    if not stats:
        return ()
    flat = [layer.flatten() for layer in stats]
    total = all_reduce_sum(torch.cat(flat), group)
    rows = total.split([row.numel() for row in flat])  # layers may have different numbers of experts
    return tuple(layer.unflatten(row) for layer, row in zip(stats, rows, strict=True))


class BalanceWindow:
    """Assignments since the optimizer step began, for balance over the global batch.

    After arXiv 2501.11873 (Qwen): counts are summed over the data-parallel ranks and kept in a buffer
    over the microbatches of a step, so that experts need only be even over the whole of it. What is
    equal to one big batch, and what is not:
    - One microbatch: all of it. The step's tokens are all counted before the loss.
    - Several: microbatch i sees the counts of 1 to i, since those of later ones do not exist yet. The
      last one has the true shares, the first those of microbatch scope, and the mean over the
      microbatches lies near the big batch's value without being it.
    - The mean probabilities are always of the microbatch alone. With the step's full counts in every
      microbatch the mean, weighted by tokens, would be the big batch's value and gradient.

    Call ``reset`` where a step begins, and ``add`` once for each microbatch of training with reduced
    statistics, outside of anything that is recomputed. Without gradients (evaluation, or the first
    pass of a reentrant recomputation) ``add`` stores nothing.
    """

    def __init__(self) -> None:
        self._counts: tuple[Tensor, ...] = ()

    def reset(self) -> None:
        """Start an optimizer step."""
        self._counts = ()

    def add(self, stats: Sequence[RoutingStats]) -> tuple[Tensor, ...]:
        """The assignments [M, E] of each layer in this step so far, including ``stats``."""
        counts = tuple(layer.counts_ME.detach() for layer in stats)
        if self._counts:
            counts = tuple(old + new for old, new in zip(self._counts, counts, strict=True))
        if torch.is_grad_enabled():
            self._counts = counts
        return counts


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


def z_loss(stats: RoutingStats, rows: slice = ALL) -> Tensor:
    """Mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906), over the experts that a token may choose."""
    return stats.z_M[rows].sum() / stats.tokens_M[rows].sum().clamp(min=1)


def layer_losses(
    stats: RoutingStats, config: RoutingLossConfig, counts_so_far_ME: Tensor | None = None
) -> dict[str, Tensor]:
    """The weighted terms of one layer, by name. ``counts_so_far_ME`` (of ``BalanceWindow``, by default those of
    ``stats``) are the counts of balance at global-batch scope. A term by modality is a mean over the modalities
    present, like the entropies; its name ends in the modality's. The names depend on ``config`` alone: the term of a
    modality without tokens is 0.
    """
    losses: dict[str, Tensor] = {}
    present_M = (stats.tokens_M > 0).to(stats.tokens_M.dtype)
    for term, compute in TERMS.items():
        weight = getattr(config, term)
        if not weight:
            continue
        if term not in config.per_modality:
            losses[term] = weight * compute(stats, ALL, config, counts_so_far_ME)
            continue
        share_M = present_M / present_M.sum().clamp(min=1)
        for m, name in enumerate(stats.names.modalities):
            value = compute(stats, slice(m, m + 1), config, counts_so_far_ME)
            losses[f"{term}/{name}"] = weight * share_M[m] * value
    if config.orthogonality:
        losses["orthogonality"] = config.orthogonality * stats.orthogonality
    terms, number = config.entropy_terms(stats.names.modalities), stats.names.modalities.index
    for term, name in terms:
        rows = [number(other) for its, other in terms if its == term]
        share_M = present_M / sum((present_M[m] for m in rows), present_M.new_zeros(())).clamp(min=1)
        m = number(name)
        if term == "local_entropy":
            value = local_entropy(stats, m)
        else:
            value = global_entropy(stats, m, config.min_experts.get(name))
        losses[f"{term}/{name}"] = getattr(config, term) * share_M[m] * value
    return losses


def loss_names(config: RoutingLossConfig, modalities: Sequence[str]) -> tuple[str, ...]:
    """The terms of ``layer_losses``, in its order."""
    names: list[str] = []
    for term in TERMS:
        if getattr(config, term):
            names += [f"{term}/{m}" for m in modalities] if term in config.per_modality else [term]
    if config.orthogonality:
        names.append("orthogonality")
    return (*names, *(f"{term}/{m}" for term, m in config.entropy_terms(modalities)))


def _balance(stats: RoutingStats, rows: slice, config: RoutingLossConfig, counts_ME: Tensor | None) -> Tensor:
    if config.balance_scope == "sequence":
        return sequence_balance(stats)
    return balance(stats, rows, counts_ME if config.balance_scope == "global_batch" else None)


# Of all tokens, or by modality: the statistics, the modalities' rows, the settings, the counts so far.
TERMS: dict[str, Callable[[RoutingStats, slice, RoutingLossConfig, Tensor | None], Tensor]] = {
    "importance": lambda stats, rows, config, counts_ME: importance(stats, rows),
    "load": lambda stats, rows, config, counts_ME: load(stats, rows),
    "balance": _balance,
    "z": lambda stats, rows, config, counts_ME: z_loss(stats, rows),
}


def routing_losses(
    stats: Sequence[RoutingStats], config: RoutingLossConfig, counts_so_far: Sequence[Tensor] | None = None
) -> dict[str, Tensor]:
    """The weighted terms by name, means over the layers; ``stats`` are reduced ones.

    ``counts_so_far`` is what ``BalanceWindow.add`` gave for them; None counts this microbatch alone.
    Thresholds and numbers of experts are each layer's own.
    """
    windows = [None] * len(stats) if counts_so_far is None else counts_so_far
    layers = [layer_losses(layer, config, counts) for layer, counts in zip(stats, windows, strict=True)]
    if not layers:
        return {}
    return {name: torch.stack([layer[name] for layer in layers]).mean() for name in layers[0]}
