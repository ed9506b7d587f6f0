"""The layer against a plain loop over tokens in fp64, and its parts at the edges."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.config import MoEConfig
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.moe.experts import grouped_linear
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.parallel.groups import SINGLE

D, FF = 8, 16


def layer(num_experts: int, top_k: int, **settings: object) -> MoELayer:
    config = MoEConfig(num_experts=num_experts, experts_per_token=top_k, expert_hidden_size=FF, **settings)
    made = MoELayer(config, D, 0, SINGLE)
    init_parameters(made, seed=3, num_layers=1)
    return made.double()


def plain_loop(moe: MoELayer, x: Tensor, top_k: int) -> Tensor:
    """Each token through each of its experts, one at a time."""
    rows = []
    for token in x:
        p = (moe.router @ token).softmax(-1)
        weights, experts = p.topk(top_k)
        if top_k > 1:
            weights = weights / weights.sum()
        out = torch.zeros_like(token)
        for weight, e in zip(weights, experts.tolist(), strict=True):
            gate, up = (token @ moe.experts.gate_up[e]).chunk(2)
            out = out + weight * ((F.silu(gate) * up) @ moe.experts.down[e])
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("num_experts,top_k,tokens", [(4, 1, 9), (4, 2, 9), (8, 8, 5), (16, 2, 3), (4, 2, 1)])
def test_forward_and_gradients_equal_a_loop_over_tokens(num_experts: int, top_k: int, tokens: int) -> None:
    moe = layer(num_experts, top_k)
    x = torch.randn(tokens, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = moe(x.requires_grad_(), torch.zeros(tokens, dtype=torch.int64))[0]
    reference = plain_loop(moe, x, top_k)
    # The router works in fp32 whatever the type of x, hence not fp64's 1e-12.
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    weights = [x, *moe.parameters()]
    target = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(torch.autograd.grad((ours * target).sum(), weights, retain_graph=True),
                            torch.autograd.grad((reference * target).sum(), weights), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_no_tokens_give_every_parameter_a_gradient_of_zeros() -> None:
    moe = layer(4, 2)
    out, _ = moe(torch.zeros(0, D, dtype=torch.float64), torch.zeros(0, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0, D)
    assert all(p.grad is not None and not p.grad.any() for p in moe.parameters())


def test_experts_without_tokens_get_a_gradient_of_zeros() -> None:
    moe = layer(4, 1)
    with torch.no_grad():
        moe.router.zero_()
        moe.router[2] = 10.0
    moe(torch.ones(5, D, dtype=torch.float64), torch.zeros(5, dtype=torch.int64))[0].sum().backward()
    used = moe.experts.down.grad.abs().sum((1, 2)) > 0
    assert used.tolist() == [False, False, True, False]


def test_a_full_expert_passes_the_rest_by() -> None:
    moe = layer(4, 1, capacity_factor=0.5)
    with torch.no_grad():
        moe.router.zero_()
        moe.router[1] = 10.0
    out, stats = moe(torch.ones(8, D, dtype=torch.float64), torch.zeros(8, dtype=torch.int64))
    assert (out.abs().sum(1) > 0).tolist() == [True] + [False] * 7  # C = ceil(0.5 * 8 / 4) = 1
    assert stats.dropped_M.tolist() == [7, 0, 0]


def test_permuting_tokens_permutes_the_output() -> None:
    moe = layer(8, 2)
    x = torch.randn(12, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    modality = torch.zeros(12, dtype=torch.int64)
    torch.testing.assert_close(moe(x[order], modality)[0], moe(x, modality)[0][order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_equals_a_product_an_expert(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = [3, 0, 4, 1]
    x = torch.randn(8, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, 16, 32, generator=generator).to(dtype).requires_grad_()
    ours = grouped_linear(x, weight, counts)
    reference = torch.cat([part @ w for part, w in zip(x.split(counts), weight, strict=True)])
    # Both accumulate in fp32 and round once to the type: two roundings apart at most.
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(ours, reference, **tolerance)
    for mine, theirs in zip(torch.autograd.grad(ours.sum(), (x, weight)),
                            torch.autograd.grad(reference.sum(), (x, weight)), strict=True):  # fmt: skip
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_an_odd_width_falls_back_to_a_product_an_expert() -> None:
    x, weight = torch.ones(3, 5), torch.ones(2, 5, 3)
    assert grouped_linear(x, weight, [1, 2]).tolist() == [[5.0] * 3] * 3
