"""A token's experts come from few groups, e.g. nodes, so that it travels to few
(DeepSeek-V2, arXiv 2405.04434, section 2.1.3; DeepSeek-V3, arXiv 2412.19437)."""

from __future__ import annotations

import math

from torch import Tensor

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.moe.routing import Choice, RouterInputs, choose_top_k


def group_limited(inputs: RouterInputs) -> Choice:
    """As softmax_top_k, inside the best ``groups_per_token`` groups; groups and experts are chosen by
    probability + bias."""
    log_p_nE = inputs.logits_nE.log_softmax(-1)
    seen_nE = within_best_groups(inputs.for_choice(log_p_nE.exp()), inputs.config)
    return choose_top_k(inputs, seen_nE, log_p_nE, log_p_nE)


def within_best_groups(scores_nE: Tensor, config: MoEConfig) -> Tensor:
    """Scores with -inf outside each token's best groups. A group is a run of E / ``node_groups`` experts,
    and is worth the sum of its best ``scores_per_group`` scores (1 in DeepSeek-V2, 2 in V3), by default
    K / ``groups_per_token``: what it would contribute."""
    grouped = scores_nE.unflatten(-1, (config.node_groups, -1))
    best = config.scores_per_group or max(1, config.experts_per_token // config.groups_per_token)
    worth_nG = grouped.topk(best, dim=-1).values.sum(-1)
    chosen = worth_nG.topk(config.groups_per_token, dim=-1).indices
    outside_nG = worth_nG.new_ones(worth_nG.shape).scatter(-1, chosen, 0).bool()
    return grouped.masked_fill(outside_nG[..., None], -math.inf).flatten(-2)
