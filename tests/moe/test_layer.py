"""The whole layer against plain loops in fp64, and its behaviour at the edges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmmoe_pretrain.config import MoEConfig
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import SINGLE
from tests.moe.plain_experts import plain_layer
from tests.moe.routing_inputs import NAMES

D, FF = 8, 16
IMAGE_AND_OTHERS = (
    {"modalities": ["image"], "num_experts": 2, "expert_hidden_size": 24},
    {"modalities": ["audio", "text"], "num_experts": 4},
    {"num_experts": 2, "expert_hidden_size": 8},
)
# The router works in fp32 whatever the type of x: its probabilities, and so the outputs, are off by
# a few units of 6e-8 times the sums of D terms behind a logit; gradients by as much of values near 10.
OUTPUT = {"rtol": 1e-5, "atol": 1e-6}
GRADIENT = {"rtol": 1e-4, "atol": 1e-5}


def layer(num_experts: int = 4, top_k: int = 2, **settings: Any) -> MoELayer:
    config = MoEConfig(num_experts=num_experts, experts_per_token=top_k, expert_hidden_size=FF, **settings)
    made = MoELayer(config, D, 0, SINGLE, NAMES)
    init_parameters(made, seed=3, num_layers=1)
    if made.router.task_embedding is not None:
        generator = torch.Generator().manual_seed(0)
        for row in made.router.task_embedding.values():
            nn.init.normal_(row, generator=generator)
    return made.double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixed_tokens(count: int) -> TokenInfo:
    """All modalities and both tasks by turns."""
    n = torch.arange(count)
    return TokenInfo(n % 3, n % 2, n // 4, n, NAMES)


def gradients(moe: MoELayer, out: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Of a fixed weighted sum of the outputs, by the names of x and the parameters."""
    leaves = {"x": x, **dict(moe.named_parameters())}
    target = normal(*out.shape, seed=1)
    return dict(zip(leaves, torch.autograd.grad((out * target).sum(), list(leaves.values())), strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        *({"num_experts": e, "top_k": k, "activation": activation}
          for e, k in [(4, 1), (8, 8), (128, 8)] for activation in ("swiglu", "gelu")),
        {"renormalize": False},
        {"shared_expert_hidden_size": 24},
        {"shared_expert_hidden_size": 8, "activation": "clamped_swiglu"},
        {"identity_experts": 2},
        {"null_experts": 2},
        {"identity_experts": 1, "null_experts": 3, "capacity_factor": 0.75},
        {"capacity_factor": 0.5},
        {"capacity_factor": 0.5, "top_k": 1},
        {"task_conditioned": True},
        {"num_experts": 8, "expert_groups": IMAGE_AND_OTHERS},
        {"num_experts": 8, "expert_groups": IMAGE_AND_OTHERS, "capacity_factor": 0.75, "shared_expert_hidden_size": 8,
         "identity_experts": 1, "null_experts": 1, "top_k": 3, "task_conditioned": True, "renormalize": False},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 24])
def test_outputs_and_gradients_equal_a_plain_loop(settings: dict[str, Any], tokens: int) -> None:
    moe = layer(**settings)
    x, info = normal(tokens, D).requires_grad_(), mixed_tokens(tokens)
    ours, plain = moe(x, info)[0], plain_layer(moe, x, info)
    torch.testing.assert_close(ours, plain, **OUTPUT)
    theirs = gradients(moe, plain, x)
    for name, gradient in gradients(moe, ours, x).items():
        torch.testing.assert_close(gradient, theirs[name], **GRADIENT, msg=lambda text, name=name: f"{name}: {text}")


def test_no_tokens_give_every_parameter_a_gradient_of_zeros() -> None:
    everything = {"num_experts": 8, "expert_groups": IMAGE_AND_OTHERS, "shared_expert_hidden_size": 8,
                  "identity_experts": 1, "task_conditioned": True}  # fmt: skip
    for settings in ({}, {"capacity_factor": 1.0}, everything, {"expert_backend": "grouped_mm"}):
        moe = layer(**settings)
        x = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
        out, stats = moe(x, mixed_tokens(0))
        out.sum().backward()
        assert out.shape == (0, D)
        assert x.grad is not None
        assert [name for name, p in moe.named_parameters() if p.grad is None or p.grad.any()] == []
        assert not stats.flatten().any()


def test_frozen_weights_still_pass_the_gradient_on_and_an_input_without_gradient_trains_them() -> None:
    moe = layer(shared_expert_hidden_size=8)
    x, info = normal(10, D).requires_grad_(), mixed_tokens(10)
    expected = gradients(moe, moe(x, info)[0], x)
    moe(x.detach(), info)[0].backward(normal(10, D, seed=1))
    for name, parameter in moe.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)
    moe.requires_grad_(False)
    moe(x, info)[0].backward(normal(10, D, seed=1))
    torch.testing.assert_close(x.grad, expected["x"], rtol=1e-6, atol=1e-6)  # fp32 of values near 1


@pytest.mark.parametrize("settings", [{}, {"num_experts": 8, "expert_groups": IMAGE_AND_OTHERS}])
def test_a_copy_and_a_reloaded_layer_compute_the_same(settings: dict[str, Any]) -> None:
    moe = layer(**settings, task_conditioned=True, shared_expert_hidden_size=8)
    reloaded = MoELayer(moe.config, D, 0, SINGLE, NAMES).double()
    reloaded.load_state_dict(moe.state_dict())
    x, info = normal(10, D), mixed_tokens(10)
    expected = moe(x, info)[0]
    for twin in (copy.deepcopy(moe), reloaded):
        assert torch.equal(twin(x, info)[0], expected)
        twin(x, info)[0].sum().backward()
    assert all(p.grad is None for p in moe.parameters())
