"""Loss-free balancing: a bias on the choice that follows the load (arXiv 2408.15664).

Routers choose by score + bias and weigh by the score, so the bias never has a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmmoe_pretrain.moe.balance import even_load
from mmmoe_pretrain.moe.stats import RoutingStats


@torch.no_grad()
def updated_bias(bias: Tensor, stats: RoutingStats, rate: float, allowed_ME: Tensor | None = None) -> Tensor:
    """b_e + rate * sign(mean load - load_e), recentred to a mean of 0 (arXiv 2408.15664, algorithm 1).

    ``bias`` is [1, E] for all tokens, or [M, E] by modality; ``stats`` are sums over all ranks and over
    the microbatches of the step; the load is assignments before any drop. Where modalities may choose
    ``allowed_ME`` alone, an expert's mean load is what it would have if each spread evenly over its
    experts. A bias that no token went by stays: a modality's without tokens, an expert's whose
    modalities have none. In [M, E] what a modality may not choose stays at 0. Recentring shifts all
    biases that compete, so it changes no choice.
    """
    reach_ME = torch.ones_like(stats.counts_ME) if allowed_ME is None else allowed_ME.to(stats.counts_ME.dtype)
    if bias.shape[0] == 1:
        moved = bias[0] + rate * _direction(stats.counts_ME, reach_ME)
        reached = (reach_ME.sum(0) > 0).to(moved.dtype)  # the others are out of the contest for now
        return (moved - (moved * reached).sum() / reached.sum().clamp(min=1))[None]
    rows = [_updated_row(row, stats.counts_ME[m : m + 1], rate, reach_ME[m : m + 1]) for m, row in enumerate(bias)]
    return torch.stack(rows)


def _updated_row(bias_E: Tensor, counts_1E: Tensor, rate: float, reach_1E: Tensor) -> Tensor:
    moved_E = bias_E + rate * _direction(counts_1E, reach_1E)
    centred_E = (moved_E - (moved_E * reach_1E[0]).sum() / reach_1E.sum()) * reach_1E[0]
    return torch.where(counts_1E.sum() > 0, centred_E, bias_E)


def _direction(counts_mE: Tensor, reach_mE: Tensor) -> Tensor:
    """[E]: sign(mean load - load_e); 0 where neither is any."""
    return torch.sign(even_load(counts_mE.sum(1), reach_mE) - counts_mE.sum(0))
