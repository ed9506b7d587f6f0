"""Load balancing: the importance, load and balance losses, over all modalities or one of them, and
loss-free balancing, a bias on the choice that follows the load.

All compare an expert's share s_e with q_e, its share if every token spread evenly over the experts that it may
choose: 1/E without expert groups, and the papers' formulas then come out. With groups an expert is compared with the
tokens that may reach it, so it does not count as unused (or overloaded) for a modality that it does not serve, or if
its modalities are absent. Experts without computation count like the others. Pure functions of sums over all ranks.

Routers choose by score + bias and weigh by the score, so the bias never has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmmoe_pretrain.moe.stats import RoutingStats

ALL = slice(None)  # rows of [M, E]: every modality
SMALL = 1e-6  # below any total of one token or more


def even_load(amount_M: Tensor, reach_ME: Tensor) -> Tensor:
    """[E]: each modality's amount spread evenly over the experts that it may choose."""
    return (amount_M / reach_ME.sum(1).clamp(min=1)) @ reach_ME


def unevenness(amount_ME: Tensor, reach_ME: Tensor) -> Tensor:
    """sum_e (s_e - q_e)^2 / q_e: the squared coefficient of variation over experts where q_e = 1/E.

    0 when even, and where nothing is; E - 1 when one of E experts has all.
    """
    total = amount_ME.sum().clamp(min=SMALL)
    share_E = amount_ME.sum(0) / total
    even_E = even_load(amount_ME.sum(1), reach_ME) / total
    return ((share_E - even_E).square() / even_E.clamp(min=torch.finfo(even_E.dtype).tiny)).sum()


def importance(stats: RoutingStats, rows: slice = ALL) -> Tensor:
    """CV^2 over experts of sum_x p_e(x) (V-MoE, arXiv 2106.05974, appendix A.2)."""
    return unevenness(stats.probability_ME[rows], stats.reach_ME[rows])


def load(stats: RoutingStats, rows: slice = ALL) -> Tensor:
    """CV^2 over experts of the smooth load (V-MoE, as above); see ``loss_sums.smooth_load``."""
    return unevenness(stats.load_ME[rows], stats.reach_ME[rows])


def balance(stats: RoutingStats, rows: slice = ALL, counts_ME: Tensor | None = None) -> Tensor:
    """sum_e f_e P_e / q_e, which is E sum_e f_e P_e without expert groups (Switch Transformer, arXiv
    2101.03961); 1 when even.

    f_e are shares of the assignments in ``counts_ME``, by default those of ``stats``; P_e are means of
    ``stats``. Only P_e has a gradient.
    """
    counts_ME = (stats.counts_ME if counts_ME is None else counts_ME)[rows]
    even_E = even_load(counts_ME.sum(1), stats.reach_ME[rows])
    overload_E = counts_ME.sum(0) / even_E.clamp(min=torch.finfo(even_E.dtype).tiny)  # f_e / q_e
    mean_E = stats.probability_ME[rows].sum(0) / stats.tokens_M[rows].sum().clamp(min=1)
    return (overload_E * mean_E).sum()


def sequence_balance(stats: RoutingStats) -> Tensor:
    """The balance loss as a mean over segments (DeepSeek-V3, arXiv 2412.19437, eq. 17-20); 1 when even."""
    total, segments = stats.sequence_balance.unbind()
    return total / segments.clamp(min=1)


@torch.no_grad()
def updated_bias(bias: Tensor, stats: RoutingStats, rate: float, allowed_ME: Tensor) -> Tensor:
    """b_e + rate * sign(mean load - load_e), recentred to a mean of 0 (arXiv 2408.15664, algorithm 1).

    ``bias`` is [1, E] for all tokens, or [M, E] by modality; ``stats`` are sums over all ranks and over
    the microbatches of the step; the load is assignments before any drop. Where modalities may choose
    ``allowed_ME`` alone, an expert's mean load is what it would have if each spread evenly over its
    experts, and the mean is over the experts within reach; the others are at 0. A row without tokens stays.
    Recentring shifts all biases that compete, so it changes no choice.
    """
    reach_ME = allowed_ME.to(stats.counts_ME.dtype)
    rows = [ALL] if bias.shape[0] == 1 else [slice(m, m + 1) for m in range(bias.shape[0])]
    updated = [_updated_row(b_E, stats.counts_ME[m], rate, reach_ME[m]) for b_E, m in zip(bias, rows, strict=True)]
    return torch.stack(updated)


def _updated_row(bias_E: Tensor, counts_mE: Tensor, rate: float, reach_mE: Tensor) -> Tensor:
    """An expert out of reach of the modalities that have tokens has no load to follow: it is only recentred."""
    moved_E = bias_E + rate * torch.sign(even_load(counts_mE.sum(1), reach_mE) - counts_mE.sum(0))
    reached_E = (reach_mE.sum(0) > 0).to(moved_E.dtype)
    centred_E = (moved_E - (moved_E * reached_E).sum() / reached_E.sum().clamp(min=1)) * reached_E
    return torch.where(counts_mE.sum() > 0, centred_E, bias_E)
