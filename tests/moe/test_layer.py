"""The whole layer against plain loops in fp64, and its behaviour at the edges."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmmoe_pretrain.config import MoEConfig
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.moe.cpu import blocked
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


def assert_equals_plain_loop(moe: MoELayer, tokens: int) -> None:
    x, info = normal(tokens, D).requires_grad_(), mixed_tokens(tokens)
    ours, plain = moe(x, info)[0], plain_layer(moe, x, info)
    torch.testing.assert_close(ours, plain, **OUTPUT)
    theirs = gradients(moe, plain, x)
    for name, gradient in gradients(moe, ours, x).items():
        torch.testing.assert_close(gradient, theirs[name], **GRADIENT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "num_experts,top_k,tokens",
    [(4, 1, 9), (4, 2, 9), (4, 2, 1), (8, 8, 5), (16, 2, 3), (32, 8, 40), (128, 1, 30), (128, 8, 30)],
)
def test_forward_and_gradients_equal_a_plain_loop(num_experts: int, top_k: int, tokens: int, activation: str) -> None:
    assert_equals_plain_loop(layer(num_experts, top_k, activation=activation), tokens)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"renormalize": False}, id="weights as they are"),
        pytest.param({"shared_expert_hidden_size": 24}, id="shared expert"),
        pytest.param({"shared_expert_hidden_size": 8, "activation": "gelu"}, id="shared expert, gelu"),
        pytest.param({"identity_experts": 2}, id="identity experts"),
        pytest.param({"null_experts": 2}, id="null experts"),
        pytest.param({"identity_experts": 1, "null_experts": 3, "capacity_factor": 0.75}, id="both, with capacity"),
        pytest.param({"capacity_factor": 0.5}, id="capacity"),
        pytest.param({"capacity_factor": 0.5, "top_k": 1}, id="capacity, one choice"),
        pytest.param({"task_conditioned": True}, id="task embedding"),
        pytest.param({"num_experts": 8, "expert_groups": IMAGE_AND_OTHERS}, id="groups"),
        pytest.param({"num_experts": 8, "expert_groups": IMAGE_AND_OTHERS, "capacity_factor": 0.75,
                      "shared_expert_hidden_size": 8, "identity_experts": 1, "null_experts": 1, "top_k": 3,
                      "task_conditioned": True, "renormalize": False}, id="everything at once"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 24])
def test_each_kind_of_expert_equals_a_plain_loop(settings: dict[str, Any], tokens: int) -> None:
    assert_equals_plain_loop(layer(**settings), tokens)


@pytest.mark.parametrize("settings", [{}, {"num_experts": 8, "expert_groups": IMAGE_AND_OTHERS}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_back_ends_give_the_same_layer(settings: dict[str, Any], dtype: torch.dtype) -> None:
    x, info = normal(30, D), mixed_tokens(30)
    found = {}
    for backend in ("blocked", "grouped_mm"):
        moe = layer(**settings, expert_backend=backend).to(dtype)
        moe.router.float()
        leaf = x.to(dtype).requires_grad_()
        out = moe(leaf, info)[0]
        found[backend] = {"out": out, **gradients(moe, out.double(), leaf)}
    # Both sum in fp32 and round the same values; a rounding of either may fall to the other side, in
    # bf16 at any of the seven roundings between x and a gradient, of values up to about 4.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}[dtype]
    for name, ours in found["blocked"].items():
        torch.testing.assert_close(ours, found["grouped_mm"][name], rtol=tolerance, atol=tolerance)


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


def test_all_tokens_to_one_expert_leave_the_others_gradients_of_zeros() -> None:
    moe = layer(4, 1)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[2] = 10.0
    x = normal(40, D).abs()  # so that expert 2 has the largest logit for all
    info = mixed_tokens(40)
    out, stats = moe(x, info)
    torch.testing.assert_close(out, plain_layer(moe, x, info), **OUTPUT)
    assert stats.counts_ME.sum(0).tolist() == [0, 0, 40, 0]
    out.sum().backward()
    for weight in (moe.experts.up, moe.experts.down):
        assert (weight.grad.abs().sum((1, 2)) > 0).tolist() == [False, False, True, False]


def test_tokens_of_null_experts_alone_return_nothing_and_still_train_everything() -> None:
    moe = layer(2, 1, null_experts=2, shared_expert_hidden_size=0)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[3] = 10.0
    out, _ = moe(normal(5, D).abs(), mixed_tokens(5))
    assert not out.any()
    out.sum().backward()
    assert [name for name, p in moe.named_parameters() if p.grad is None] == []


def test_a_full_expert_passes_the_rest_by() -> None:
    moe = layer(4, 1, capacity_factor=0.5)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.weight[1] = 10.0
    out, stats = moe(
        torch.ones(8, D, dtype=torch.float64), TokenInfo.of_modalities(torch.zeros(8, dtype=torch.int64), NAMES)
    )
    assert (out.abs().sum(1) > 0).tolist() == [True] + [False] * 7  # C = ceil(0.5 * 8 / 4) = 1
    assert stats.dropped_M.tolist() == [7, 0, 0]


def test_modalities_reach_their_own_experts_alone() -> None:
    moe = layer(8, 2, expert_groups=IMAGE_AND_OTHERS)
    _, stats = moe(normal(60, D), mixed_tokens(60))
    served_ME = stats.counts_ME > 0
    assert not served_ME[0, 2:6].any() and not served_ME[1:, :2].any()
    assert served_ME[:, 6:].any(0).all()  # the shared group


def test_small_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = layer(2, 1)
    x, info = normal(700, D).requires_grad_(), mixed_tokens(700)
    whole = moe(x, info)[0]
    expected = gradients(moe, whole, x)
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 1)  # 256 rows
    pieces = moe(x, info)[0]
    # The same products over fewer rows at a time: fp64 sums of hundreds of terms in another order.
    torch.testing.assert_close(pieces, whole, rtol=1e-11, atol=1e-11)
    for name, gradient in gradients(moe, pieces, x).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-11)


def test_two_threads_give_what_one_gives() -> None:
    moe = layer(16, 2, shared_expert_hidden_size=8)
    x, info = normal(90, D).requires_grad_(), mixed_tokens(90)
    out = moe(x, info)[0]
    expected = gradients(moe, out, x)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        again = moe(x, info)[0]
        torch.testing.assert_close(again, out, rtol=1e-12, atol=1e-12)
        for name, gradient in gradients(moe, again, x).items():
            # Router gradients are fp32 products, which two threads may split otherwise.
            torch.testing.assert_close(gradient, expected[name], **GRADIENT)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_experts": 8, "expert_groups": IMAGE_AND_OTHERS, "shared_expert_hidden_size": 8},
        {"jitter": 0.5},
        {"router": "noisy_top_k"},
    ],
)
def test_recomputation_in_the_backward_pass_gives_the_same_gradients(
    settings: dict[str, Any], use_reentrant: bool
) -> None:
    moe = layer(**settings)
    x, info = normal(20, D).requires_grad_(), mixed_tokens(20)
    results = []
    for run in (lambda leaf: moe(leaf, info)[0],
                lambda leaf: checkpoint(lambda y: moe(y, info)[0], leaf, use_reentrant=use_reentrant)):  # fmt: skip
        moe.zero_grad()
        x.grad = None
        out = run(x)
        out.backward(normal(20, D, seed=1))
        results.append([out.detach(), x.grad, *(p.grad for p in moe.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


@pytest.mark.parametrize("backend,dtype", [("blocked", torch.float64), ("grouped_mm", torch.float32)])
def test_frozen_weights_still_pass_the_gradient_on(backend: str, dtype: torch.dtype) -> None:
    moe = layer(expert_backend=backend, shared_expert_hidden_size=8).to(dtype)
    x, info = normal(10, D).to(dtype).requires_grad_(), mixed_tokens(10)
    moe(x, info)[0].square().sum().backward()
    expected, x.grad = x.grad, None
    moe.requires_grad_(False)
    moe(x, info)[0].square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-6, atol=1e-6)  # fp32 of values near 1


def test_an_input_without_gradient_trains_the_weights_all_the_same() -> None:
    moe = layer(shared_expert_hidden_size=8)
    x, info = normal(10, D), mixed_tokens(10)
    moe(x.clone().requires_grad_(), info)[0].square().sum().backward()
    expected = [p.grad for p in moe.parameters()]
    moe.zero_grad()
    moe(x, info)[0].square().sum().backward()
    for gradient, parameter in zip(expected, moe.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_modes_give_the_same_output(mode: type) -> None:
    moe = layer(8, 2, expert_groups=IMAGE_AND_OTHERS, shared_expert_hidden_size=8, identity_experts=1)
    x, info = normal(10, D), mixed_tokens(10)
    with mode():
        out, stats = moe(x, info)
    expected, expected_stats = moe(x, info)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=0)
    torch.testing.assert_close(stats.flatten(), expected_stats.flatten().detach(), rtol=0, atol=0)


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
