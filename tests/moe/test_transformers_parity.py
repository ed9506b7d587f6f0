"""Hugging Face transformers' Mixtral and OLMoE blocks with the same weights: the same outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmmoe_pretrain.config import MoEConfig
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import SINGLE

pytest.importorskip("transformers", reason="parity with transformers needs the extra: pip install -e '.[bench]'")

from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe

D, FF, TOKENS = 32, 64, 50
SIZES: dict[str, Any] = {"hidden_size": D, "intermediate_size": FF, "hidden_act": "silu"}


def mixtral(num_experts: int, top_k: int, renormalize: bool) -> nn.Module:
    assert renormalize  # it knows nothing else
    config = modeling_mixtral.MixtralConfig(**SIZES, num_local_experts=num_experts, num_experts_per_tok=top_k)
    return modeling_mixtral.MixtralSparseMoeBlock(config)


def olmoe(num_experts: int, top_k: int, renormalize: bool) -> nn.Module:
    config = modeling_olmoe.OlmoeConfig(
        **SIZES, num_experts=num_experts, num_experts_per_tok=top_k, norm_topk_prob=renormalize
    )
    return modeling_olmoe.OlmoeSparseMoeBlock(config)


def with_weights_of(block: nn.Module, moe: MoELayer) -> nn.Module:
    """Theirs are laid out as ours: [E, 2F, D] with the gate first, and [E, D, F]."""
    state = {
        "gate.weight": moe.router.weight,
        "experts.gate_up_proj": moe.experts.up,
        "experts.down_proj": moe.experts.down,
    }
    block.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    return block.train()


def ours_and_theirs(moe: MoELayer, block: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and all gradients of the same weighted sum of outputs, under our names and in our shapes."""
    generator = torch.Generator().manual_seed(0)
    x, target = (torch.randn(TOKENS, D, generator=generator) for _ in range(2))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = moe(a, TokenInfo.of_modalities(torch.zeros(TOKENS, dtype=torch.int64)))[0]
    (out * target).sum().backward()
    their_out = block(b.view(2, TOKENS // 2, D)).view(TOKENS, D)
    (their_out * target).sum().backward()
    ours = {"out": out, "x": a.grad, "router": moe.router.weight.grad,
            "up": moe.experts.up.grad, "down": moe.experts.down.grad}  # fmt: skip
    theirs = {"out": their_out, "x": b.grad, "router": block.gate.weight.grad,
              "up": block.experts.gate_up_proj.grad,
              "down": block.experts.down_proj.grad}  # fmt: skip
    return ours, theirs


@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
@pytest.mark.parametrize("num_experts,top_k", [(8, 2), (16, 8), (64, 8)])
@pytest.mark.parametrize("build,renormalize", [(mixtral, True), (olmoe, True), (olmoe, False)])
def test_outputs_and_gradients_are_those_of_transformers(
    build: Any, renormalize: bool, num_experts: int, top_k: int, backend: str
) -> None:
    config = MoEConfig(
        num_experts=num_experts,
        experts_per_token=top_k,
        expert_hidden_size=FF,
        renormalize=renormalize,
        expert_backend=backend,
    )
    moe = MoELayer(config, D, 0, SINGLE)
    init_parameters(moe, seed=3, num_layers=1)
    ours, theirs = ours_and_theirs(moe, with_weights_of(build(num_experts, top_k, renormalize), moe))
    for name, value in ours.items():
        # fp32 sums of 32 to 100 terms near 1 in another order (6e-8 each), and the routing weight
        # multiplied before the second product here, after it there.
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        assert value.abs().max() > 0.01  # far above the tolerance: they agree on something
