"""What holds for every router and any logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmmoe_pretrain.kinds import ROUTERS
from mmmoe_pretrain.moe.routing import expert_capacity
from mmmoe_pretrain.moe.tokens import TokenInfo
from tests.moe.routing_inputs import dense_weights, identity_router, tokens_of

TOKEN_CHOICE = sorted(ROUTERS.builtin.keys() - {"expert_choice"})
MASKABLE = ["expert_choice", "noisy_top_k", "sigmoid_top_k", "softmax_top_k"]


@st.composite
def cases(draw: Any) -> tuple[Tensor, TokenInfo, int]:
    """Logits of 0 to 8 tokens over an even number of experts up to 8, their tokens, and K."""
    n, num_experts = draw(st.integers(0, 8)), 2 * draw(st.integers(1, 4))
    logit = st.one_of(st.floats(-4, 4, width=32), st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 1.0]))
    values = draw(st.lists(logit, min_size=n * num_experts, max_size=n * num_experts))
    modalities = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    return torch.tensor(values).view(n, num_experts), tokens_of(modalities), draw(st.integers(1, num_experts))


def kept_by_expert(ids: Tensor, kept: Tensor, num_experts: int) -> Tensor:
    return torch.bincount(ids[kept], minlength=num_experts)


@pytest.mark.parametrize("name", TOKEN_CHOICE)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_dropless_routing_gives_every_token_k_experts_of_its_own(name: str, case: Any) -> None:
    logits, tokens, top_k = case
    routing = identity_router(logits.shape[1], router=name, experts_per_token=top_k)(logits, tokens)
    assert routing.kept_nK.all() and routing.kept_nK.shape == (logits.shape[0], top_k)
    assert all(len(set(row)) == top_k for row in routing.expert_ids_nK.tolist())
    assert (routing.weights_nK >= 0).all()
    if top_k > 1:  # renormalised; a sum of 8 numbers in fp32
        torch.testing.assert_close(routing.weights_nK.sum(-1), torch.ones(logits.shape[0]), atol=1e-6, rtol=0)
    assert routing.stats.counts_ME.sum() == routing.kept_nK.numel()
    assert not routing.stats.dropped_M.any()


@pytest.mark.parametrize("name", sorted(ROUTERS.builtin))
@settings(max_examples=40, deadline=None)
@given(case=cases(), factor=st.sampled_from([0.1, 0.5, 1.0, 1.3, 4.0]), first=st.booleans())
def test_no_expert_keeps_more_than_its_capacity(name: str, case: Any, factor: float, first: bool) -> None:
    logits, tokens, top_k = case
    n, num_experts = logits.shape
    chosen = {"capacity_factor": factor, "batch_priority": first and name != "expert_choice"}
    routing = identity_router(num_experts, router=name, experts_per_token=top_k, **chosen)(logits, tokens)
    room = expert_capacity(factor, n, top_k, num_experts)
    taken = kept_by_expert(routing.expert_ids_nK, routing.kept_nK, num_experts)
    assert (taken <= room).all()
    assert not routing.weights_nK[~routing.kept_nK].any()
    if name == "expert_choice":
        assert (taken == min(room, n)).all()
        return
    wanted = routing.stats.counts_ME.sum(0)
    assert torch.equal(taken.float(), wanted.clamp(max=room))  # no place stays empty while one is wanted
    assert routing.stats.dropped_M.sum() == (~routing.kept_nK).sum()


@pytest.mark.parametrize("name", MASKABLE)
@settings(max_examples=40, deadline=None)
@given(case=cases(), renormalize=st.booleans())
def test_no_token_reaches_an_expert_of_another_modality(name: str, case: Any, renormalize: bool) -> None:
    logits, tokens, _ = case
    half = logits.shape[1] // 2
    groups = ({"num_experts": half, "modalities": ("image",)}, {"num_experts": half, "modalities": ("audio", "text")})
    router = identity_router(2 * half, router=name, experts_per_token=half, expert_groups=groups,
                             renormalize=renormalize, losses={"local_entropy": 1.0, "z": 1.0})  # fmt: skip
    x = logits.clone().requires_grad_()
    routing = router(x, tokens)
    is_image = (tokens.modality_ids_n == 0)[:, None]
    elsewhere = torch.where(is_image, routing.expert_ids_nK >= half, routing.expert_ids_nK < half)
    assert not (elsewhere & routing.kept_nK).any()
    stats = routing.stats
    total = routing.weights_nK.sum() + stats.entropy_MX.sum() + stats.z_MX.sum() + stats.probability_MXE.sum()
    gradients = torch.autograd.grad(total, [x, router.weight])
    assert total.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    # As many nats as there are reachable experts, at most.
    assert stats.entropy_MX.sum() <= logits.shape[0] * math.log(half) + 1e-3


@pytest.mark.parametrize("name", sorted(ROUTERS.builtin))
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), limited=st.booleans())
def test_permuting_tokens_permutes_decisions(name: str, seed: int, limited: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(7, 6, generator=generator)  # no ties
    order = torch.randperm(7, generator=generator)
    tokens = tokens_of(torch.randint(3, (7,), generator=generator).tolist(), keys=range(10, 17))
    permuted = tokens_of(tokens.modality_ids_n[order].tolist(), keys=tokens.keys_n[order].tolist())
    chosen = {"capacity_factor": 1.0 if limited else None, "batch_priority": limited and name != "expert_choice"}
    if name == "hash" and limited:  # all tokens are equally confident: position decides
        return
    router = identity_router(6, router=name, **chosen).eval()
    expected = dense_weights(router(logits, tokens), 6)[order]
    torch.testing.assert_close(dense_weights(router(logits[order], permuted), 6), expected)
