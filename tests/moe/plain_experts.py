"""The expert layer as plain loops in fp64: what every back end and dispatcher must equal.

Written from the formulas alone; shares no code with the package but the values it is given.
Shapes: n tokens, D hidden size, K choices, A assignments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.moe.experts import ExpertGroups
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.tokens import TokenInfo


def expert(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    up_bias: Tensor | float = 0.0,
    down_bias: Tensor | float = 0.0,
) -> Tensor:
    """[..., D] through one expert; up [F, D] (or gate and up [2F, D]) and down [D, F]."""
    first = x @ up.t() + up_bias
    gate, value = first.chunk(2, dim=-1)
    if activation == "gelu":
        h = first * 0.5 * (1 + torch.erf(first / math.sqrt(2)))
    elif activation == "swiglu":
        h = gate / (1 + torch.exp(-gate)) * value
    else:  # clamped SwiGLU of GPT-OSS, arXiv 2508.10925
        gate = gate.clamp(max=7)
        h = (value.clamp(-7, 7) + 1) * gate / (1 + torch.exp(-1.702 * gate))
    return h @ down.t() + down_bias


def weighted_experts(
    x_nD: Tensor, ids_nK: Tensor, weights_nK: Tensor, ups: list[Tensor], downs: list[Tensor], activation: str
) -> Tensor:
    """sum_k weight_k expert_k(x) of each token; ids from ``len(ups)`` on compute nothing."""
    out_nD = torch.zeros_like(x_nD)
    for e, (up, down) in enumerate(zip(ups, downs, strict=True)):
        y_nD = expert(x_nD, up, down, activation)
        weight_n = (weights_nK * (ids_nK == e)).sum(1)
        out_nD = out_nD + weight_n[:, None] * y_nD
    return out_nD


def reachable(config: MoEConfig, modality: str) -> list[int]:
    """The experts that a modality may choose."""
    found, first = [], 0
    for group in config.groups:
        found += range(first, first + group.num_experts) if modality in (group.modalities or (modality,)) else []
        first += group.num_experts
    return found


def choices(moe: MoELayer, x_nD: Tensor, tokens: TokenInfo) -> tuple[Tensor, Tensor]:
    """Softmax top-k by the book: ids and weights [n, K], the weight 0 where an expert was full."""
    config, router = moe.config, moe.router
    seen_nD = x_nD
    if router.task_embedding is not None:
        seen_nD = seen_nD + torch.cat([router.task_embedding[task] for task in tokens.names.tasks])[tokens.task_ids_n]
    logits_nE = seen_nD @ router.weight.t()
    for m, name in enumerate(tokens.names.modalities):
        rows = tokens.modality_ids_n == m
        for e in set(range(config.num_experts)) - set(reachable(config, name)):
            logits_nE[rows, e] = -math.inf
    p_nE = logits_nE.softmax(-1)
    weights_nK, ids_nK = p_nE.topk(config.experts_per_token)
    if config.renormalize and config.experts_per_token > 1:
        weights_nK = weights_nK / weights_nK.sum(1, keepdim=True)
    if config.capacity_factor is not None:
        num_tokens, top_k = ids_nK.shape
        capacity = math.ceil(config.capacity_factor * num_tokens * top_k / config.router_outputs)
        room = [capacity] * config.router_outputs
        kept = torch.zeros_like(weights_nK)
        for k in range(top_k):
            for n in range(num_tokens):
                e = int(ids_nK[n, k])
                kept[n, k] = float(room[e] > 0)
                room[e] -= 1
        weights_nK = weights_nK * kept
    return ids_nK, weights_nK


def plain_layer(moe: MoELayer, x_nD: Tensor, tokens: TokenInfo) -> Tensor:
    """The layer in the type of x and its weights (use fp64); router softmax_top_k with a linear gate."""
    config = moe.config
    ids_nK, weights_nK = choices(moe, x_nD, tokens)
    stacks = list(moe.experts.stacks) if isinstance(moe.experts, ExpertGroups) else [moe.experts]
    ups = [up for stack in stacks for up in stack.up]
    downs = [down for stack in stacks for down in stack.down]
    out_nD = weighted_experts(x_nD, ids_nK, weights_nK, ups, downs, config.activation)
    is_identity = (ids_nK >= config.num_experts) & (ids_nK < config.num_experts + config.identity_experts)
    out_nD = out_nD + (weights_nK * is_identity).sum(1, keepdim=True) * x_nD
    if moe.shared is not None:
        up, down = moe.shared.up.weight, moe.shared.down.weight
        out_nD = out_nD + expert(x_nD, up, down, config.activation)
    return out_nD
