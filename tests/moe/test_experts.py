"""Stacks of experts: their sizes, their places over the ranks, and what a copy of them keeps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmmoe_pretrain.config import MoEConfig, OptimizerConfig
from mmmoe_pretrain.engines.deepspeed_setup import make_optimizer
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.moe.experts import ExpertGroups, Experts, make_experts, slot_of_expert
from mmmoe_pretrain.moe.plan import plan_of_slots
from mmmoe_pretrain.parallel.cuts import is_vector
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from tests.moe.plain_experts import expert

D = 8
UNLIKE = MoEConfig(
    num_experts=6,
    expert_hidden_size=16,
    expert_groups=[
        {"modalities": ["image"], "num_experts": 2, "expert_hidden_size": 24},
        {"modalities": ["audio", "text"], "num_experts": 4},
    ],
)


def built(config: MoEConfig, groups: Groups = SINGLE) -> nn.Module:
    made = make_experts(config, D, groups)
    init_parameters(made, seed=3, num_layers=1)
    return made.double()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


GPT_OSS = {"activation": "clamped_swiglu", "expert_biases": True}


def run(experts: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """[n, D] through the experts ``ids`` [n, K], 6 meaning none."""
    plan, order_A = plan_of_slots(ids, 6)
    return experts(x, weights.reshape(-1)[order_A], plan)


def with_biases(config: MoEConfig, dtype: torch.dtype = torch.float64) -> list[Experts]:
    """The stacks, with biases that are not 0."""
    made = built(config)
    stacks = list(made.stacks) if isinstance(made, ExpertGroups) else [made]
    for i, stack in enumerate(stacks):
        stack.up_bias.data = normal(*stack.up_bias.shape, seed=10 + i)
        stack.down_bias.data = normal(*stack.down_bias.shape, seed=20 + i)
    made.to(dtype)
    return stacks


IDS = {
    "all experts": [[0, 4], [1, 5], [3, 2], [6, 1], [6, 6], [4, 0]],  # some go nowhere
    "a group without tokens": [[3, 4], [2, 5], [6, 3], [6, 6], [4, 5], [2, 3]],
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend,dtype", [("blocked", torch.float64), ("grouped_mm", torch.float32)])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("chosen", IDS)
@pytest.mark.parametrize(
    "base", [UNLIKE, MoEConfig(num_experts=6, expert_hidden_size=16)], ids=["groups", "one stack"]
)
def test_groups_biases_and_weights_on_the_input_equal_a_loop(
    base: MoEConfig, chosen: str, on_input: bool, backend: str, dtype: torch.dtype, recompute: bool
) -> None:
    settings = {**GPT_OSS, "router_weight_on_input": on_input, "expert_backend": backend}
    stacks = with_biases(base.model_copy(update=settings), dtype)
    experts = ExpertGroups(stacks) if len(stacks) > 1 else stacks[0]
    for stack in stacks:
        stack.recompute = recompute
    ids = torch.tensor(IDS[chosen])
    x = (4 * normal(6, D)).to(dtype).requires_grad_()
    weights = normal(6, 2, seed=1).to(dtype).requires_grad_()
    ours, loop = run(experts, x, ids, weights), torch.zeros(6, D, dtype=dtype)
    each = [(stack, e) for stack in stacks for e in range(len(stack.up))]
    assert any((x @ stack.up[e].t()).abs().max() > 7 for stack, e in each)  # something is clamped
    for index, (stack, e) in enumerate(each):
        for k in range(2):
            rows, w = ids[:, k] == index, weights[:, k : k + 1]
            weight = (stack.up[e], stack.down[e], stack.activation, stack.up_bias[e], stack.down_bias[e])
            y = expert(w * x, *weight) if on_input else w * expert(x, *weight)
            loop = loop + torch.where(rows[:, None], y, 0.0)
    exact = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
    leaves, target = [x, weights, *experts.parameters()], normal(6, D, seed=2).to(dtype)
    assert len(leaves) == 2 + 4 * len(stacks)
    found, expected = (torch.autograd.grad((y * target).sum(), leaves) for y in (ours, loop))
    for mine, theirs in zip((ours, *found), (loop, *expected), strict=True):
        torch.testing.assert_close(mine, theirs, **exact)  # sums of tens of terms of up to 100 in another order


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("backend", ["blocked", "grouped_mm"])
def test_a_bad_row_reaches_no_bias_of_an_expert_that_it_does_not_visit(
    backend: str, on_input: bool, bad: float
) -> None:
    settings = {**GPT_OSS, "router_weight_on_input": on_input, "expert_backend": backend}
    (experts,) = with_biases(MoEConfig(num_experts=6, expert_hidden_size=16, **settings), torch.float32)
    ids, weights = torch.tensor([[0]] + [[1]] * 45 + [[2]] * 7), normal(53, 1, seed=1).float()
    x = normal(53, D).float()

    def gradients(first: int) -> list[Tensor]:
        out = run(experts, x[first:], ids[first:], weights[first:])
        return [g[1:] for g in torch.autograd.grad(out.square().sum(), list(experts.parameters()))]

    without = gradients(1)
    assert all(g[:2].isfinite().all() and g[:2].any() for g in without)
    x[0] = bad
    for found, expected in zip(gradients(0), without, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # fp32 sums of 45 rows in another order


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("base", [UNLIKE, MoEConfig(num_experts=6)], ids=["groups", "one stack"])
def test_no_tokens_give_gradients_of_zeros(base: MoEConfig, on_input: bool) -> None:
    stacks = with_biases(base.model_copy(update={**GPT_OSS, "router_weight_on_input": on_input}))
    experts = ExpertGroups(stacks) if len(stacks) > 1 else stacks[0]
    for ids in (torch.zeros(0, 2, dtype=torch.int64), torch.full((3, 2), 6)):
        out = run(experts, normal(len(ids), D).requires_grad_(), ids, torch.ones(ids.shape, requires_grad=True))
        found = torch.autograd.grad(out.sum(), list(experts.parameters()))
        assert out.shape == (len(ids), D) and not any(g.any() for g in (out, *found))


def test_biases_are_vectors_which_do_not_decay_and_stay_fp32() -> None:
    (experts,) = with_biases(MoEConfig(num_experts=6, **GPT_OSS), torch.float32)
    for twin in (experts, copy.deepcopy(experts)):
        vectors = [name for name, parameter in twin.named_parameters() if is_vector(parameter)]
        assert vectors == ["up_bias", "down_bias"]
    groups = make_optimizer(experts, OptimizerConfig(), SINGLE).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(2, 0.1), (2, 0.0)]


def test_ranks_share_the_weights_of_the_whole_whose_sizes_are_those_of_each_group() -> None:
    whole = built(UNLIKE).state_dict()
    assert [tuple(weight.shape) for weight in whole.values()] == [(2, 48, D), (2, D, 24), (4, 32, D), (4, D, 16)]
    halves = [built(UNLIKE, Groups(expert_rank=rank, expert_size=2)) for rank in range(2)]
    for name, weight in whole.items():
        assert torch.equal(torch.cat([half.state_dict()[name] for half in halves]), weight)
    assert [stack.local_experts for stack in halves[1].stacks] == [range(1, 2), range(2, 4)]
    gelu = built(MoEConfig(num_experts=4, expert_hidden_size=16, activation="gelu"))
    assert tuple(gelu.up.shape) == (4, 16, D)


def test_slots_go_by_rank_and_then_by_group() -> None:
    assert slot_of_expert(MoEConfig(num_experts=4), 2).tolist() == [0, 1, 2, 3]
    # Rank 0 holds image expert 0 and others 2, 3; rank 1 image expert 1 and others 4, 5.
    assert slot_of_expert(UNLIKE, 2).tolist() == [0, 3, 1, 2, 4, 5]
    assert slot_of_expert(UNLIKE, 1).tolist() == [0, 1, 2, 3, 4, 5]
    free = UNLIKE.model_copy(update={"identity_experts": 1, "null_experts": 2})
    assert slot_of_expert(free, 2).tolist() == [0, 3, 1, 2, 4, 5, 6, 6, 6]  # 6 is nowhere


def test_a_group_that_does_not_spread_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"group of 2 experts .*expert_parallel_size 4; use a multiple of 4"):
        slot_of_expert(UNLIKE, 4)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_marked_as_experts_too(twin_of: Callable[[nn.Module], nn.Module]) -> None:
    experts = built(UNLIKE)
    twin = twin_of(experts)
    for a, b in zip(experts.parameters(), twin.parameters(), strict=True):
        # megatron-core would otherwise sum the gradients of different experts
        assert a.allreduce is False and b.allreduce is False
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def test_the_state_is_the_weights_and_biases_begin_at_zero() -> None:
    experts = built(UNLIKE.model_copy(update=GPT_OSS))
    names = ("up", "down", "up_bias", "down_bias")
    assert list(experts.state_dict()) == [f"stacks.{group}.{name}" for group in range(2) for name in names]
    assert not any(value.any() for name, value in experts.state_dict().items() if name.endswith("bias"))
