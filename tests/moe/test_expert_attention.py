"""Attention among a token's experts against plain loops, and what it is at the start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmmoe_pretrain.moe.expert_attention import ExpertAttention, flops
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.tokens import TokenInfo
from tests.moe.plain_experts import choices, expert
from tests.moe.test_layer import GRADIENT, OUTPUT, D, gradients, layer, mixed_tokens, normal

SIZE = 4


def layer_with_attention(**settings: Any) -> MoELayer:
    moe = layer(expert_attention_size=SIZE, **settings)
    assert moe.expert_attention is not None
    moe.expert_attention.out.weight.data = normal(D, SIZE, seed=2)
    return moe


def plain_layer(moe: MoELayer, x_nD: Tensor, tokens: TokenInfo) -> Tensor:
    """Token by token, choice by choice, from the formulas of ``expert_attention.py``."""
    config, attention = moe.config, moe.expert_attention
    assert attention is not None
    ids_nK, weights_nK = choices(moe, x_nD, tokens)
    to_query, to_key, to_value = attention.qkv.weight.split(SIZE)
    rows = []
    for x, ids, weights in zip(x_nD, ids_nK.tolist(), weights_nK, strict=True):
        made = []
        for e, weight in zip(ids, weights, strict=True):
            is_null = e >= config.num_experts + config.identity_experts
            if is_null or weight == 0:  # over the capacity
                continue
            y = x if e >= config.num_experts else expert(x, moe.experts.up[e], moe.experts.down[e], config.activation)
            made.append((weight, y))
        seen = [y / (y.square().mean() + 1e-6).sqrt() for _, y in made]
        total = torch.zeros_like(x)
        for (weight, y), h in zip(made, seen, strict=True):
            scores = torch.stack([(to_query @ h) @ (to_key @ other) / math.sqrt(SIZE) for other in seen])
            told = sum(s * (to_value @ other) for s, other in zip(scores.softmax(0), seen, strict=True))
            total = total + weight * (y + attention.out.weight @ told)
        if moe.shared is not None:
            total = total + expert(x, moe.shared.up.weight, moe.shared.down.weight, config.activation)
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_experts": 8, "top_k": 4, "shared_expert_hidden_size": 8},
        {"top_k": 3, "identity_experts": 1, "null_experts": 2, "capacity_factor": 0.5},
    ],
    ids=str,
)
def test_outputs_and_gradients_equal_a_plain_loop(settings: dict[str, Any]) -> None:
    moe, x, info = layer_with_attention(**settings), normal(12, D).requires_grad_(), mixed_tokens(12)
    ours, plain = moe(x, info)[0], plain_layer(moe, x, info)
    torch.testing.assert_close(ours, plain, **OUTPUT)
    theirs = gradients(moe, plain, x)
    for name, gradient in gradients(moe, ours, x).items():
        torch.testing.assert_close(gradient, theirs[name], **GRADIENT, msg=lambda text, name=name: f"{name}: {text}")


def test_it_begins_as_plain_top_k_and_learns() -> None:
    moe, plain = layer(expert_attention_size=SIZE, shared_expert_hidden_size=8), layer(shared_expert_hidden_size=8)
    x, info = normal(12, D), mixed_tokens(12)
    out = moe(x, info)[0]
    torch.testing.assert_close(out, plain(x, info)[0], rtol=1e-12, atol=1e-12)
    out.square().sum().backward()
    assert moe.expert_attention is not None and moe.expert_attention.out.weight.grad.any()


def test_a_token_whose_choices_have_no_output_gets_zeros_and_finite_gradients() -> None:
    attention = ExpertAttention(D, SIZE)
    y_nKD = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    there_nK = torch.tensor([[False, False, False], [True, False, True]])
    told_nKD = attention(y_nKD, there_nK)
    told_nKD.square().sum().backward()
    assert not told_nKD[0].any() and not told_nKD[1, 1].any() and told_nKD[1, 0].any()
    assert y_nKD.grad is not None and y_nKD.grad.isfinite().all()
    assert not y_nKD.grad[0].any() and not y_nKD.grad[1, 1].any()  # what is absent is not looked at


def test_it_costs_what_torch_counts() -> None:
    y_nKD, there_nK = torch.zeros(7, 3, D), torch.ones(7, 3, dtype=torch.bool)
    with FlopCounterMode(display=False) as counter:
        ExpertAttention(D, SIZE)(y_nKD, there_nK)
    assert counter.get_total_flops() == 7 * flops(D, SIZE, 3)
