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


def local_entropy(stats: RoutingStats, rows: slice) -> Tensor:
    """Mean over the tokens of H(p(x)); small when single tokens route confidently.

    LIMoE, arXiv 2206.02770, section 2.2.
    """
    return stats.entropy_M[rows].sum() / stats.tokens_M[rows].sum().clamp(min=1)


def global_entropy(stats: RoutingStats, rows: slice, min_experts: float | None) -> Tensor:
    """-H(p_bar), or max(0, log(min_experts) - H(p_bar)): at least that many experts in use; H is 0 without tokens.

    LIMoE, arXiv 2206.02770, section 2.2 and its soft threshold.
    """
    p_E = stats.probability_ME[rows].sum(0) / stats.tokens_M[rows].sum().clamp(min=1)
    entropy = -torch.xlogy(p_E, p_E.clamp(min=torch.finfo(p_E.dtype).tiny)).sum()
    return -entropy if min_experts is None else (math.log(min_experts) - entropy).clamp(min=0)


def z_loss(stats: RoutingStats, rows: slice = ALL) -> Tensor:
    """Mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906), over the experts that a token may choose."""
    return stats.z_M[rows].sum() / stats.tokens_M[rows].sum().clamp(min=1)


def combination(stats: RoutingStats) -> Tensor:
    """Sum over the tokens of samples that lack a modality of -log p of their combination's expert, over the number of
    all tokens: so a token weighs the same however many such samples there are and however a step is cut.

    Flex-MoE, arXiv 2410.08245: the S-Router's loss. Tokens of complete samples are in none of it (G-Router).
    """
    return stats.combination_C3[:, 0].sum() / stats.tokens_M.sum().clamp(min=1)


def _balance(stats: RoutingStats, rows: slice, config: RoutingLossConfig, counts_ME: Tensor | None) -> Tensor:
    if config.balance_scope == "sequence":
        return sequence_balance(stats)
    return balance(stats, rows, counts_ME if config.balance_scope == "global_batch" else None)


def _global_entropy(stats: RoutingStats, rows: slice, config: RoutingLossConfig, counts_ME: Tensor | None) -> Tensor:
    return global_entropy(stats, rows, config.min_experts.get(stats.names.modalities[rows.start]))


# Of all tokens, or of one modality: the statistics, the modalities' rows, the settings, the counts so far.
TERMS: dict[str, Callable[[RoutingStats, slice, RoutingLossConfig, Tensor | None], Tensor]] = {
    "importance": lambda stats, rows, config, counts_ME: importance(stats, rows),
    "load": lambda stats, rows, config, counts_ME: load(stats, rows),
    "balance": _balance,
    "z": lambda stats, rows, config, counts_ME: z_loss(stats, rows),
    "orthogonality": lambda stats, rows, config, counts_ME: stats.orthogonality,
    "combination": lambda stats, rows, config, counts_ME: combination(stats),
    "local_entropy": lambda stats, rows, config, counts_ME: local_entropy(stats, rows),
    "global_entropy": _global_entropy,
}
ENTROPIES = ("local_entropy", "global_entropy")


def _terms(config: RoutingLossConfig, modalities: Sequence[str]) -> dict[str, tuple[str, str | None]]:
    """Name -> what ``TERMS`` calls it, and the modality whose tokens it is of (None: of all tokens)."""
    terms: list[tuple[str, str | None]] = []
    for term in TERMS:
        if term not in ENTROPIES and getattr(config, term):
            terms += [(term, m) for m in (modalities if term in config.per_modality else (None,))]
    terms += config.entropy_terms(modalities)
    return {term if m is None else f"{term}/{m}": (term, m) for term, m in terms}


def loss_names(config: RoutingLossConfig, modalities: Sequence[str]) -> tuple[str, ...]:
    """The terms of ``layer_losses``, in its order."""
    return tuple(_terms(config, modalities))


def layer_losses(
    stats: RoutingStats, config: RoutingLossConfig, counts_so_far_ME: Tensor | None = None
) -> dict[str, Tensor]:
    """The weighted terms of one layer, by name. ``counts_so_far_ME`` (of ``BalanceWindow``, by default those of
    ``stats``) are the counts of balance at global-batch scope. A term by modality is a mean over the modalities
    present that take part in it; its name ends in the modality's. The names depend on ``config`` alone: the term of a
    modality without tokens is 0.
    """
    modalities = stats.names.modalities
    present_M = (stats.tokens_M > 0).to(stats.tokens_M.dtype)
    terms = _terms(config, modalities)
    losses: dict[str, Tensor] = {}
    for name, (term, modality) in terms.items():
        weight: float | Tensor = getattr(config, term)
        rows = ALL
        if modality is not None:
            m = modalities.index(modality)
            present = [present_M[modalities.index(other)] for its, other in terms.values() if its == term and other]
            weight, rows = weight * (present_M[m] / torch.stack(present).sum().clamp(min=1)), slice(m, m + 1)
        losses[name] = weight * TERMS[term](stats, rows, config, counts_so_far_ME)
    return losses


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
