"""What holds for any routing: of the dispatcher, of the layer, and of the model around it."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import MoEConfig, RunConfig
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.dispatch import LocalDispatcher
from mmmoe_pretrain.moe.experts import ExpertGroups, Experts
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.plan import ExpertPlan
from mmmoe_pretrain.moe.routing import Routing
from mmmoe_pretrain.moe.stats import RoutingStats, gather_stats
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import SINGLE
from tests.moe.plain_experts import weighted_experts
from tests.moe.routing_inputs import NAMES
from tests.support import objectives, random_batch, tiny_config

D, FF = 4, 3
FEW = settings(max_examples=40, deadline=None)
WITHOUT_CAPACITY = {
    "softmax_top_k": {},
    "sigmoid_top_k": {},
    "group_limited": {"node_groups": 2},
    "noisy_top_k": {},
    "hash": {},
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens_of(n: int, seed: int = 0) -> TokenInfo:
    drawn = torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(seed))
    return TokenInfo(drawn % 3, drawn // 3, torch.arange(n) // 3, torch.arange(n), NAMES)


@st.composite
def routings(draw: Any) -> tuple[Tensor, Tensor, int]:
    """Slots [n, K] of 1 to 6 experts, E meaning nowhere, the same one twice not excluded; weights; E."""
    n, top_k, num_experts = draw(st.integers(0, 10)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    slot, weight = st.integers(0, num_experts), st.floats(-2, 2, width=32)
    slots = draw(st.lists(slot, min_size=n * top_k, max_size=n * top_k))
    weights = draw(st.lists(weight, min_size=n * top_k, max_size=n * top_k))
    return (
        torch.tensor(slots, dtype=torch.int64).view(n, top_k),
        torch.tensor(weights, dtype=torch.float64).view(n, top_k),
        num_experts,
    )


@FEW
@given(case=routings())
def test_the_dispatcher_computes_each_assignment_once_and_nothing_else(case: tuple[Tensor, Tensor, int]) -> None:
    slots, weights, num_experts = case
    experts = Experts(range(num_experts), D, FF, "swiglu", "auto").double()
    init_parameters(experts, seed=1, num_layers=1)
    x, computed = normal(0, slots.shape[0], D), []

    def compute(x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan) -> Tensor:
        computed.extend(zip(_experts_of(plan), plan.rows_A.tolist(), weights_A.tolist(), strict=True))
        return experts(x_mD, weights_A, plan)

    out, overlapped = LocalDispatcher(num_experts).run(x, slots, weights, compute, lambda: x + 1)
    wanted = [(slot, n, w) for n, row in enumerate(zip(slots.tolist(), weights.tolist(), strict=True))
              for slot, w in zip(*row, strict=True) if slot < num_experts]  # fmt: skip
    assert sorted(computed) == sorted(wanted)
    torch.testing.assert_close(
        out, weighted_experts(x, slots, weights, list(experts.up), list(experts.down), "swiglu")
    )
    assert torch.equal(overlapped, x + 1)


def _experts_of(plan: ExpertPlan) -> list[int]:
    return [e for e, count in enumerate(plan.counts) for _ in range(count)]


@st.composite
def layers(draw: Any, capacity: bool) -> tuple[MoELayer, Tensor, TokenInfo]:
    """A layer with drawn router weights (ties and large ones among them), and up to 20 tokens for it."""
    num_experts = draw(st.integers(2, 6))
    free = draw(st.sampled_from([{}, {"identity_experts": 1}, {"null_experts": 1}]))
    config = MoEConfig(
        num_experts=num_experts,
        experts_per_token=draw(st.integers(1, num_experts)),
        expert_hidden_size=FF,
        capacity_factor=draw(st.sampled_from([0.25, 0.5, 1.0, 2.0])) if capacity else None,
        batch_priority=capacity and draw(st.booleans()),
        renormalize=draw(st.booleans()),
        **free,
    )
    layer = MoELayer(config, D, 0, SINGLE, NAMES)
    init_parameters(layer, seed=2, num_layers=1)
    count = config.router_outputs * D
    weight = st.one_of(st.integers(-1, 1).map(float), st.floats(-30, 30, width=32))
    values = torch.tensor(draw(st.lists(weight, min_size=count, max_size=count)))
    layer.router.weight.data.copy_(values.view(-1, D))
    n = draw(st.integers(0, 20))
    return layer.double(), normal(draw(st.integers(0, 9)), n, D), tokens_of(n)


def run(layer: MoELayer, x: Tensor, tokens: TokenInfo) -> tuple[Tensor, Routing, list[int]]:
    """The output, what the router decided, and the assignments that each expert computed."""
    counts: list[int] = []
    decided: list[Routing] = []
    hooks = [
        layer.router.register_forward_hook(lambda _module, _args, routing: decided.append(routing)),
        layer.experts.register_forward_pre_hook(lambda _module, args: counts.extend(args[2].counts)),
    ]
    out, _ = layer(x, tokens)
    for hook in hooks:
        hook.remove()
    return out, decided[0], counts


def weighted_sum(layer: MoELayer, x: Tensor, routing: Routing) -> Tensor:
    """Of the experts that the router chose, dropped ones included with the weight they got."""
    config, ids, weights = layer.config, routing.expert_ids_nK, routing.weights_nK.double()
    stacks = layer.experts.stacks if isinstance(layer.experts, ExpertGroups) else [layer.experts]
    ups, downs = ([weight for stack in stacks for weight in getattr(stack, name)] for name in ("up", "down"))
    out = weighted_experts(x, ids, weights, ups, downs, "swiglu")
    is_identity = (ids >= config.num_experts) & (ids < config.num_experts + config.identity_experts)
    return out + (weights * is_identity).sum(1, keepdim=True) * x


@FEW
@given(case=layers(capacity=False))
def test_dropless_routing_drops_nothing(case: tuple[MoELayer, Tensor, TokenInfo]) -> None:
    layer, x, tokens = case
    config, (n, top_k) = layer.config, (x.shape[0], layer.config.experts_per_token)
    out, routing, counts = run(layer, x, tokens)
    assert routing.kept_nK.all() and not routing.stats.dropped_MX.any()
    assert all(len(set(ids)) == top_k for ids in routing.expert_ids_nK.tolist())  # K different experts
    to_free_experts = int((routing.expert_ids_nK >= config.num_experts).sum())
    assert sum(counts) == n * top_k - to_free_experts
    torch.testing.assert_close(out, weighted_sum(layer, x, routing))
    if config.renormalize and top_k > 1:
        # K fp32 numbers that were divided by their sum.
        torch.testing.assert_close(routing.weights_nK.sum(1), torch.ones(n), rtol=1e-6, atol=1e-6)
    else:
        p = (x.float() @ layer.router.weight.t().float()).softmax(-1)
        expected = p.topk(top_k).values.sum(1)
        torch.testing.assert_close(routing.weights_nK.sum(1), expected, rtol=1e-5, atol=1e-6)


@FEW
@given(case=layers(capacity=True))
def test_no_expert_computes_more_than_its_capacity(case: tuple[MoELayer, Tensor, TokenInfo]) -> None:
    layer, x, tokens = case
    config, (n, top_k) = layer.config, (x.shape[0], layer.config.experts_per_token)
    out, routing, counts = run(layer, x, tokens)
    room = math.ceil(config.capacity_factor * n * top_k / config.router_outputs)
    wanted = torch.bincount(routing.expert_ids_nK.reshape(-1), minlength=config.router_outputs).tolist()
    # Filled up to C, and not one place less.
    assert counts == [min(count, room) for count in wanted[: config.num_experts]]
    dropped = sum(max(count - room, 0) for count in wanted)
    assert routing.stats.dropped_MX.sum().item() == dropped == int((~routing.kept_nK).sum())
    assert not routing.weights_nK[~routing.kept_nK].any()
    torch.testing.assert_close(out, weighted_sum(layer, x, routing))
    # What is kept weighs what it would without any capacity: the dropped share is not handed on.
    dropless = MoELayer(
        config.model_copy(update={"capacity_factor": None, "batch_priority": False}), D, 0, SINGLE, NAMES
    )
    dropless.double().load_state_dict(layer.state_dict())
    free = dropless.router(x, tokens)
    assert torch.equal(routing.weights_nK.sum(1), (free.weights_nK * routing.kept_nK).sum(1))


@FEW
@given(seed=st.integers(0, 1000), n=st.integers(0, 20), top_k=st.integers(1, 3), modalities=st.booleans())
def test_experts_that_choose_compute_what_they_chose(seed: int, n: int, top_k: int, modalities: bool) -> None:
    groups = [{"modalities": ["image"], "num_experts": 2}, {"modalities": ["audio", "text"], "num_experts": 3}]
    config = MoEConfig(
        router="expert_choice",
        num_experts=5,
        experts_per_token=top_k - modalities if top_k > 1 else 1,
        expert_hidden_size=FF,
        expert_groups=[{"num_experts": 5}] if not modalities else groups,
    )
    layer = MoELayer(config, D, 0, SINGLE, NAMES).double()
    init_parameters(layer, seed, num_layers=1)
    x, tokens = normal(seed, n, D), tokens_of(n, seed)
    out, routing, counts = run(layer, x, tokens)
    room = math.ceil(n * config.experts_per_token / 5)
    images = int((tokens.modality_ids_n == 0).sum())
    reach = [images] * 2 + [n - images] * 3 if modalities else [n] * 5
    assert counts == [min(room, reachable) for reachable in reach]
    torch.testing.assert_close(out, weighted_sum(layer, x, routing))


@pytest.mark.parametrize("router", list(WITHOUT_CAPACITY))
@FEW
@given(seed=st.integers(0, 1000), n=st.integers(0, 20), top_k=st.integers(1, 3))
def test_permuting_tokens_permutes_outputs(router: str, seed: int, n: int, top_k: int) -> None:
    config = MoEConfig(
        router=router, num_experts=6, experts_per_token=top_k, expert_hidden_size=FF, **WITHOUT_CAPACITY[router]
    )
    layer = MoELayer(config, D, 0, SINGLE, NAMES).double().eval()
    init_parameters(layer, seed, num_layers=1)
    x, tokens = normal(seed, n, D), tokens_of(n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    shuffled = dataclasses.replace(
        tokens, **{name: value[order] for name, value in vars(tokens).items() if isinstance(value, torch.Tensor)}
    )
    (out, stats), (permuted, permuted_stats) = layer(x, tokens), layer(x[order], shuffled)
    # Logits are fp32 products, of which the last bit may depend on the place in the block.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(permuted, out[order], **close)
    torch.testing.assert_close(permuted_stats.flatten(), stats.flatten(), rtol=1e-5, atol=1e-5)


def longer(batch: Batch, by: int, seed: int) -> Batch:
    """The same batch with ``by`` more rows of padding, which carry noise where nothing may look."""
    noise = torch.randint(0, 3, (by,), generator=torch.Generator().manual_seed(seed))
    tails = {
        "modality_ids": noise,
        "positions": noise + 1,
        "segment_ids": torch.full((by,), -1),
        "valid": torch.zeros(by, dtype=torch.bool),
        "keys": noise,
    }
    return dataclasses.replace(batch, **{name: torch.cat([getattr(batch, name), end]) for name, end in tails.items()})


def model_config(router: str) -> RunConfig:
    losses = {"local_entropy": 0.01, "global_entropy": 0.01, "balance": 0.01, "importance": 0.01, "z": 0.001}
    moe = {"router": router, "num_experts": 4, "expert_hidden_size": 8, "capacity_factor": 1.0, "losses": losses}
    moe |= {"batch_priority": True, "task_conditioned": True} if router == "softmax_top_k" else {}
    return tiny_config(Path("unused"), moe=moe, objectives=objectives())


@functools.cache
def model_of(router: str) -> PretrainingModel:
    return PretrainingModel(model_config(router))


@pytest.mark.parametrize("router", ["softmax_top_k", "sigmoid_top_k", "hash"])
@settings(max_examples=10, deadline=None)
@given(
    has=st.lists(st.sampled_from(["iat", "it", "at", "i", "t", ""]), max_size=4),
    by=st.integers(1, 200),
    seed=st.integers(0, 99),
)
def test_padding_changes_nothing(router: str, has: list[str], by: int, seed: int) -> None:
    model = model_of(router)
    batch = random_batch(model.config, has, seed)
    with torch.no_grad():
        short, long = model.mmmoe(batch)[0], model.mmmoe(longer(batch, by, seed))[0]
        (loss, report), (long_loss, long_report) = model(batch), model(longer(batch, by, seed))
    assert all(torch.equal(short.features[m], long.features[m]) for m in short.features)
    assert torch.equal(short.token_nll["captioning"], long.token_nll["captioning"])
    assert torch.equal(loss, long_loss)
    assert report.losses.keys() == long_report.losses.keys()
    assert all(torch.equal(value, long_report.losses[name]) for name, value in report.losses.items())
    for a, b in zip(report.routing, long_report.routing, strict=True):
        assert torch.equal(a.flatten(), b.flatten())
        assert torch.equal(a.coactivation_MEE, b.coactivation_MEE)
        assert a.tokens_M.sum().item() == int(batch.valid.sum())


@FEW
@given(n=st.integers(0, 20), first=st.integers(0, 20), top_k=st.integers(1, 4), seed=st.integers(0, 99))
def test_statistics_of_a_whole_are_the_sums_of_its_parts(n: int, first: int, top_k: int, seed: int) -> None:
    first, num_experts, tokens = min(first, n), 5, tokens_of(n, seed)
    logits = normal(seed, n, num_experts)
    log_p = logits.log_softmax(-1)
    ids = log_p.topk(top_k).indices
    kept = normal(seed + 1, n, top_k) > -1

    def stats(start: int, end: int) -> RoutingStats:
        part = slice(start, end)
        return gather_stats(logits[part], log_p[part], ids[part], kept[part], tokens.slice(start, end))

    whole, parts = stats(0, n), stats(0, first) + stats(first, n)
    torch.testing.assert_close(parts.flatten(), whole.flatten())
    torch.testing.assert_close(parts.coactivation_MEE, whole.coactivation_MEE)
    # And the whole by counting: tokens, assignments and pairs of choices kept by modality.
    for m in range(3):
        mine = (tokens.modality_ids_n == m).nonzero().flatten().tolist()
        assert whole.tokens_M[m].item() == len(mine)
        assert whole.dropped_M[m].item() == sum(int((~kept[i]).sum()) for i in mine)
        for e in range(num_experts):
            assert whole.counts_ME[m, e].item() == sum(e in ids[i].tolist() for i in mine)
            for other in range(num_experts):
                both = [i for i in mine if {e, other} <= set(ids[i][kept[i]].tolist()) and e != other]
                assert whole.coactivation_MEE[m, e, other].item() == len(both)
