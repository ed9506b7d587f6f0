"""What holds for any routing: of every router, of the dispatcher, of the layer, and of the model around it."""

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
from mmmoe_pretrain.kinds import ROUTERS
from mmmoe_pretrain.models.init import init_parameters
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.dispatch import LocalDispatcher
from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.loss_sums import gather_stats
from mmmoe_pretrain.moe.plan import ExpertPlan
from mmmoe_pretrain.moe.routing import Choice, Routing, expert_capacity
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import TokenInfo
from mmmoe_pretrain.parallel.groups import SINGLE
from tests.moe.plain_experts import weighted_experts
from tests.moe.routing_inputs import NAMES, dense_weights, identity_router, inputs_of, tokens_of
from tests.support import objectives, random_batch, tiny_config

D, FF = 4, 3
FEW = settings(max_examples=40, deadline=None)
MASKABLE = ["expert_choice", "noisy_top_k", "sigmoid_top_k", "softmax_top_k"]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mixed_tokens(n: int, seed: int = 0) -> TokenInfo:
    drawn = torch.randint(0, 6, (n,), generator=torch.Generator().manual_seed(seed))
    return TokenInfo(drawn % 3, drawn // 3, torch.arange(n) // 3, torch.arange(n), NAMES)


@st.composite
def decisions(draw: Any) -> tuple[Tensor, TokenInfo, int]:
    """Logits of 0 to 8 tokens over an even number of experts up to 8, their tokens, and K."""
    n, num_experts = draw(st.integers(0, 8)), 2 * draw(st.integers(1, 4))
    logit = st.one_of(st.floats(-4, 4, width=32), st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, 1.0]))
    values = draw(st.lists(logit, min_size=n * num_experts, max_size=n * num_experts))
    modalities = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    return torch.tensor(values).view(n, num_experts), tokens_of(modalities), draw(st.integers(1, num_experts))


@pytest.mark.parametrize("name", sorted(ROUTERS.builtin))
@FEW
@given(case=decisions(), factor=st.sampled_from([None, 0.1, 0.5, 1.0, 1.3, 4.0]), first=st.booleans())
def test_every_token_gets_k_experts_and_no_expert_more_than_its_capacity(
    name: str, case: Any, factor: float | None, first: bool
) -> None:
    logits, tokens, top_k = case
    n, num_experts = logits.shape
    priority = first and factor is not None and name != "expert_choice"
    settings = {"capacity_factor": factor, "batch_priority": priority}
    router = identity_router(num_experts, router=name, experts_per_token=top_k, **settings).eval()
    routing = router(logits, tokens)
    room = n if factor is None else expert_capacity(factor, n, top_k, num_experts)
    taken = torch.bincount(routing.expert_ids_nK[routing.kept_nK], minlength=num_experts)
    assert (routing.weights_nK >= 0).all() and not routing.weights_nK[~routing.kept_nK].any()
    if name == "expert_choice":
        assert (taken == min(expert_capacity(factor or 1.0, n, top_k, num_experts), n)).all()
        return
    assert all(len(set(row)) == top_k for row in routing.expert_ids_nK.tolist())
    assert routing.stats.counts_ME.sum() == n * top_k
    assert torch.equal(taken.float(), routing.stats.counts_ME.sum(0).clamp(max=room))  # filled, and not overfilled
    assert routing.stats.dropped_M.sum() == (~routing.kept_nK).sum()
    # What is kept weighs what it would without any capacity: the dropped share is not handed on.
    free = identity_router(num_experts, router=name, experts_per_token=top_k).eval()(logits, tokens).weights_nK
    assert torch.equal(routing.weights_nK, free * routing.kept_nK)
    if top_k > 1:  # renormalised; a sum of 8 numbers in fp32
        torch.testing.assert_close(free.sum(-1), torch.ones(n), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MASKABLE)
@FEW
@given(case=decisions(), renormalize=st.booleans())
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
    gradients = torch.autograd.grad(total, [x, *router.parameters()])
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


@FEW
@given(n=st.integers(0, 20), first=st.integers(0, 20), top_k=st.integers(1, 5), seed=st.integers(0, 99))
def test_statistics_of_a_whole_are_the_sums_of_its_parts(n: int, first: int, top_k: int, seed: int) -> None:
    first, num_experts, tokens = min(first, n), 5, mixed_tokens(n, seed)
    logits = normal(seed, n, num_experts)
    log_p = logits.log_softmax(-1)
    ids = log_p.topk(top_k).indices
    kept = normal(seed + 1, n, top_k) > -1

    def stats(start: int, end: int) -> RoutingStats:
        part = slice(start, end)
        own = TokenInfo(tokens.modality_ids_n[part], tokens.task_ids_n[part], tokens.segment_ids_n[part],
                        tokens.keys_n[part], NAMES)  # fmt: skip
        inputs = inputs_of(logits[part], own)
        choice = Choice(ids[part], log_p.gather(1, ids)[part], log_p[part], log_p[part].amax(-1))
        return gather_stats(
            inputs, choice, kept[part], torch.ones(3, num_experts).bool(), torch.zeros(num_experts, D)
        )

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


@st.composite
def assignments(draw: Any) -> tuple[Tensor, Tensor, int]:
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
@given(case=assignments())
def test_the_dispatcher_computes_each_assignment_once_and_nothing_else(case: tuple[Tensor, Tensor, int]) -> None:
    slots, weights, num_experts = case
    experts = Experts(range(num_experts), D, FF, MoEConfig()).double()
    init_parameters(experts, seed=1, num_layers=1)
    x, computed = normal(0, slots.shape[0], D), []

    def compute(x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan) -> Tensor:
        computed.extend(zip(plan.experts_A.tolist(), plan.rows_A.tolist(), weights_A.tolist(), strict=True))
        return experts(x_mD, weights_A, plan)

    out, overlapped, _ = LocalDispatcher(num_experts).run(x, slots, weights, compute, lambda: x + 1)
    wanted = [(slot, n, w) for n, row in enumerate(zip(slots.tolist(), weights.tolist(), strict=True))
              for slot, w in zip(*row, strict=True) if slot < num_experts]  # fmt: skip
    assert sorted(computed) == sorted(wanted)
    loop = weighted_experts(x, slots, weights, list(experts.up), list(experts.down), "swiglu")
    torch.testing.assert_close(out, loop)
    assert torch.equal(overlapped, x + 1)


@st.composite
def layers(draw: Any) -> MoELayer:
    """A layer with drawn router weights, ties and large ones among them."""
    num_experts = draw(st.integers(2, 6))
    router = draw(st.sampled_from(["softmax_top_k", "expert_choice"]))
    factor = draw(st.sampled_from([None, 0.25, 0.5, 1.0, 2.0]))
    config = MoEConfig(
        router=router,
        num_experts=num_experts,
        experts_per_token=draw(st.integers(1, num_experts)),
        expert_hidden_size=FF,
        capacity_factor=factor,
        batch_priority=router == "softmax_top_k" and factor is not None and draw(st.booleans()),
        renormalize=draw(st.booleans()),
        **draw(st.sampled_from([{}, {"identity_experts": 1}, {"null_experts": 1}])),
    )
    layer = MoELayer(config, D, 0, SINGLE, NAMES)
    init_parameters(layer, seed=2, num_layers=1)
    count = config.router_outputs * D
    weight = st.one_of(st.integers(-1, 1).map(float), st.floats(-30, 30, width=32))
    values = torch.tensor(draw(st.lists(weight, min_size=count, max_size=count)))
    layer.router.weight.data.copy_(values.view(-1, D))
    return layer.double()


@FEW
@given(layer=layers(), n=st.integers(0, 20), seed=st.integers(0, 9))
def test_the_layer_computes_what_its_router_has_kept(layer: MoELayer, n: int, seed: int) -> None:
    config, experts, x = layer.config, layer.experts, normal(seed, n, D)
    counts: list[int] = []
    decided: list[Routing] = []
    layer.router.register_forward_hook(lambda _module, _args, routing: decided.append(routing))
    experts.register_forward_pre_hook(lambda _module, args: counts.extend(args[2].counts))
    out, _ = layer(x, mixed_tokens(n, seed))
    ids, kept, weights = decided[0].expert_ids_nK, decided[0].kept_nK, decided[0].weights_nK.double()
    assert counts == torch.bincount(ids[kept], minlength=config.router_outputs)[: config.num_experts].tolist()
    expected = weighted_experts(x, ids, weights, list(experts.up), list(experts.down), "swiglu")
    is_identity = (ids >= config.num_experts) & (ids < config.num_experts + config.identity_experts)
    torch.testing.assert_close(out, expected + (weights * is_identity).sum(1, keepdim=True) * x)


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


SCOPES = {"softmax_top_k": "sequence", "sigmoid_top_k": "global_batch", "hash": "microbatch"}


def model_config(router: str) -> RunConfig:
    losses = {"local_entropy": 0.01, "global_entropy": 0.01, "balance": 0.01, "importance": 0.01, "z": 0.001,
              "orthogonality": 0.01, "load": 0.0 if router == "hash" else 0.01,
              "balance_scope": SCOPES[router]}  # fmt: skip
    moe = {"router": router, "num_experts": 4, "expert_hidden_size": 8, "capacity_factor": 1.0, "losses": losses}
    moe |= {"batch_priority": True, "task_conditioned": True} if router == "softmax_top_k" else {}
    return tiny_config(Path("unused"), moe=moe, objectives=objectives())


@functools.cache
def model_of(router: str) -> PretrainingModel:
    return PretrainingModel(model_config(router))


@pytest.mark.parametrize("router", SCOPES)
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
    assert len([name for name in report.losses if name.startswith("aux/")]) == 4 + (router != "hash") + 2 * 3
    assert all(torch.equal(value, long_report.losses[name]) for name, value in report.losses.items())
    for a, b in zip(report.routing, long_report.routing, strict=True):
        assert torch.equal(a.flatten(), b.flatten())
        assert torch.equal(a.coactivation_MEE, b.coactivation_MEE)
        assert a.tokens_M.sum().item() == int(batch.valid.sum())
