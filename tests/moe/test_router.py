"""The router of a layer: gates, masks, noise, tasks, capacity and what differs by layer."""

import dataclasses
import math

import pytest
import torch

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.kinds import ROUTERS
from mmmoe_pretrain.moe.router import GATES, Router, laplace_gate, linear_gate
from mmmoe_pretrain.moe.routing import Routing
from tests.moe.routing_inputs import AUDIO, IMAGE, NAMES, TEXT, identity_router, logs, tokens_of

P = [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.25, 0.15]]
MODALITY_GROUPS = (
    {"num_experts": 2, "modalities": ("image",)},
    {"num_experts": 2, "modalities": ("audio", "text")},
    {"num_experts": 1},
)


def test_linear_gate_is_a_dot_product() -> None:
    x, w = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, -1.0]])
    assert linear_gate(x, w).tolist() == [[11.0, -2.0]]


def test_laplace_gate_is_minus_the_distance() -> None:
    x, w = torch.tensor([[1.0, 1.0]]), torch.tensor([[4.0, 5.0], [1.0, 2.0], [1.0, 1.0]])
    torch.testing.assert_close(laplace_gate(x, w), torch.tensor([[-5.0, -1.0, 0.0]]))


def test_laplace_gradient_is_the_direction_and_finite_at_the_expert_itself() -> None:
    x = torch.tensor([[1.0, 1.0]], requires_grad=True)
    w = torch.tensor([[4.0, 5.0], [1.0, 1.0]], requires_grad=True)
    gx, gw = torch.autograd.grad(laplace_gate(x, w).sum(), (x, w))
    # d -|x - w| / dx = -(x - w) / |x - w| = (3, 4) / 5; nothing at distance 0
    torch.testing.assert_close(gx, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(gw, torch.tensor([[-0.6, -0.8], [0.0, 0.0]]))


def test_laplace_logits_do_not_depend_on_the_other_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 16, generator=generator), torch.randn(8, 16, generator=generator)
    torch.testing.assert_close(laplace_gate(x, w)[:8], laplace_gate(x[:8], w))
    x[:8] = w
    # |x|^2 + |w|^2 - 2 x w of numbers around 16 is rounded at some 1e-6, and the root makes that 1e-3.
    torch.testing.assert_close(laplace_gate(x, w)[:8].diagonal(), torch.zeros(8), atol=0.01, rtol=0)


@pytest.mark.parametrize("gate", sorted(GATES))
def test_every_gate_takes_no_tokens(gate: str) -> None:
    x, w = torch.zeros(0, 4), torch.ones(3, 4, requires_grad=True)
    logits = GATES[gate](x, w)
    logits.sum().backward()
    assert logits.shape == (0, 3) and w.grad is not None and not w.grad.any()


def test_routing_follows_the_named_gate() -> None:
    router = Router(MoEConfig(num_experts=2, experts_per_token=1, gate="laplace"), 2, layer=0, names=NAMES)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 10.0]]))
    routing = router(torch.tensor([[2.0, 2.0]]), tokens_of([0]))  # x . w: 6 and 20; |x - w|: sqrt 5 and sqrt 68
    assert routing.expert_ids_nK.tolist() == [[0]]
    expected = 1 / (1 + math.exp(5**0.5 - 68**0.5))
    torch.testing.assert_close(routing.weights_nK, torch.tensor([[expected]]))


def test_dropped_choices_weigh_nothing_and_are_counted_by_modality() -> None:
    router = identity_router(3, experts_per_token=1, capacity_factor=1.0, batch_priority=True)  # C = 1
    routing = router(logs(P), tokens_of([IMAGE, TEXT, TEXT]))
    assert routing.kept_nK.tolist() == [[False], [True], [True]]  # 0.6 beats 0.5 for expert 0
    torch.testing.assert_close(routing.weights_nK, torch.tensor([[0.0], [0.7], [0.6]]))
    assert routing.stats.dropped_M.tolist() == [1, 0, 0]
    assert routing.stats.counts_ME.tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 1]]  # before the drop


def test_without_batch_priority_the_first_tokens_are_kept() -> None:
    router = identity_router(3, experts_per_token=1, capacity_factor=1.0)
    assert router(logs(P), tokens_of([0, 0, 0])).kept_nK.tolist() == [[True], [True], [False]]


def test_statistics_are_sums_over_the_tokens_of_a_modality() -> None:
    stats = identity_router(3)(logs(P), tokens_of([IMAGE, TEXT, TEXT])).stats
    assert stats.layer == 1
    assert stats.tokens_M.tolist() == [1, 0, 2]
    assert stats.counts_ME.tolist() == [[1, 1, 0], [0, 0, 0], [1, 2, 1]]
    torch.testing.assert_close(stats.probability_ME[TEXT], torch.tensor([0.7, 0.45, 0.85]))
    assert stats.entropy_M[IMAGE].item() == pytest.approx(-sum(p * math.log(p) for p in P[0]), rel=1e-6)
    assert stats.z_M.tolist() == pytest.approx([0.0] * 3, abs=1e-9)  # logsumexp of log-probabilities is 0


def test_modalities_keep_to_their_experts_and_the_shared_ones() -> None:
    router = identity_router(5, expert_groups=MODALITY_GROUPS)
    x = logs([[0.1, 0.05, 0.3, 0.4, 0.15], [0.3, 0.4, 0.05, 0.04, 0.21], [0.3, 0.3, 0.15, 0.05, 0.2]])
    routing = router(x, tokens_of([IMAGE, AUDIO, TEXT]))
    assert routing.expert_ids_nK.tolist() == [[4, 0], [4, 2], [4, 2]]
    chosen = torch.tensor([[0.15 / 0.25, 0.1 / 0.25], [0.21 / 0.26, 0.05 / 0.26], [0.2 / 0.35, 0.15 / 0.35]])
    torch.testing.assert_close(routing.weights_nK, chosen)
    # The distribution is over the reachable experts alone: text has 0.15, 0.05 and 0.2 of 0.4.
    expected = torch.tensor([0.0, 0.0, 0.375, 0.125, 0.5])
    torch.testing.assert_close(routing.stats.probability_ME[TEXT], expected)
    assert routing.stats.entropy_M[TEXT].item() == pytest.approx(-sum(p * math.log(p) for p in (0.375, 0.125, 0.5)))
    # z = logsumexp(logits)^2 over the same ones
    assert routing.stats.z_M[TEXT].item() == pytest.approx(math.log(0.4) ** 2, rel=1e-5)


def test_experts_without_computation_serve_every_modality() -> None:
    groups = tuple({"num_experts": 1, "modalities": (name,)} for name in ("image", "audio", "text"))
    router = Router(
        MoEConfig(num_experts=3, identity_experts=1, null_experts=1, expert_groups=groups), 4, layer=0, names=NAMES
    )
    expected = [[True, False, False, True, True], [False, True, False, True, True], [False, False, True, True, True]]
    assert router.get_buffer("allowed_ME").tolist() == expected


@pytest.mark.parametrize("name", ["softmax_top_k", "sigmoid_top_k", "noisy_top_k", "expert_choice"])
def test_masked_experts_leave_values_and_gradients_finite(name: str) -> None:
    losses = {"local_entropy": 1, "z": 1, "load": float(name != "expert_choice")}  # which has no top k
    config = MoEConfig(num_experts=5, router=name, expert_groups=MODALITY_GROUPS, losses=losses)
    router = Router(config, 6, layer=0, names=NAMES)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    routing = router(x, tokens_of([IMAGE, AUDIO, TEXT] * 3))
    stats = routing.stats
    total = routing.weights_nK[:, 0].sum() + stats.entropy_MX.sum() + stats.z_MX.sum() + stats.load_ME.sum()
    gradients = torch.autograd.grad(total + stats.probability_MXE.square().sum(), [x, *router.parameters()])
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_token_trains_only_the_rows_of_the_experts_it_may_choose() -> None:
    router = identity_router(5, expert_groups=MODALITY_GROUPS, renormalize=False, losses={"z": 1.0})
    routing = router(torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), tokens_of([IMAGE] * 4))
    (routing.weights_nK.sum() + routing.stats.z_MX.sum()).backward()
    assert (router.weight.grad.abs().sum(1) > 0).tolist() == [True, True, False, False, True]


def draw(router: Router, x: torch.Tensor, number: int = 0) -> torch.Tensor:
    tokens = dataclasses.replace(tokens_of([0] * x.shape[0]), draw=number)
    return router(x, tokens).stats.probability_MXE.detach()


@pytest.mark.parametrize("settings", [{"jitter": 0.1}, {"router": "noisy_top_k"}], ids=["jitter", "noise"])
def test_noise_follows_from_the_seed_and_the_number_of_the_pass(settings: dict[str, object]) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    router, twin = identity_router(8, **settings), identity_router(8, **settings)
    router.begin_step(5)
    first, second = draw(router, x), draw(router, x, 1)
    assert not torch.equal(first, second)
    twin.begin_step(5)
    torch.rand(3)  # the default generator plays no part
    assert torch.equal(draw(twin, x, 1), second) and torch.equal(draw(twin, x), first)
    router.begin_step(6)
    assert not torch.equal(draw(router, x), first)


def test_layers_draw_different_noise() -> None:
    x = torch.ones(4, 8)
    config = MoEConfig(num_experts=8, jitter=0.5)
    drawn = []
    for layer in (1, 3):
        router = Router(config, 8, layer=layer, names=NAMES)
        with torch.no_grad():
            router.weight.copy_(torch.eye(8))
        router.begin_step(5)
        drawn.append(draw(router, x))
    assert not torch.equal(*drawn)


def test_any_integer_is_a_seed() -> None:
    router = identity_router(8, jitter=0.1)
    for seed in (0, -1, 2**63, 10**30):
        router.begin_step(seed)
        assert draw(router, torch.ones(2, 8)).isfinite().all()


@pytest.mark.parametrize("settings", [{"jitter": 0.1}, {"router": "noisy_top_k"}], ids=["jitter", "noise"])
def test_nothing_is_random_outside_training(settings: dict[str, object]) -> None:
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    router = identity_router(8, **settings).eval()
    torch.testing.assert_close(draw(router, x).sum((0, 1)), x.softmax(-1).sum(0))


def test_jitter_stays_within_its_bounds() -> None:
    router = identity_router(8, jitter=0.1)
    seen = router._input(torch.ones(500, 8), tokens_of([0] * 500), router._generator(0, torch.device("cpu")))
    assert seen.min() >= 0.9 and seen.max() <= 1.1
    assert seen.min() < 0.91 and seen.max() > 1.09  # 4,000 uniform draws come near both ends
    assert seen.mean().item() == pytest.approx(1.0, abs=0.005)  # five standard errors of 0.1 / sqrt(3 * 4000)


def test_the_task_embedding_decides_and_learns() -> None:
    router = identity_router(3, experts_per_token=1, task_conditioned=True)
    with torch.no_grad():
        router.task_embedding["captioning"][0] = torch.tensor([0.0, 0.0, math.log(9.0)])
    x = logs([[0.5, 0.3, 0.2]] * 2)
    routing = router(x, tokens_of([IMAGE, IMAGE], tasks=[0, 1]))
    assert routing.expert_ids_nK.tolist() == [[0], [2]]
    torch.testing.assert_close(routing.weights_nK, torch.tensor([[0.5], [1.8 / 2.6]]))  # 0.5, 0.3, 9 * 0.2
    routing.weights_nK[1].sum().backward()
    assert [bool(router.task_embedding[task].grad.any()) for task in NAMES.tasks] == [False, True]
    assert routing.stats.tokens_MX[IMAGE].tolist() == [1, 1]


def test_the_bias_of_a_modality_moves_its_tokens_alone() -> None:
    router = identity_router(3, experts_per_token=1, bias_balancing={"rate": 0.1, "per_modality": True})
    router.bias.get_buffer("text").copy_(torch.tensor([[-1.0, 0.0, 0.0]]))
    routing = router(logs([P[0], P[0]]), tokens_of([IMAGE, TEXT]))
    assert routing.expert_ids_nK.tolist() == [[0], [1]]
    torch.testing.assert_close(routing.weights_nK, torch.tensor([[0.5], [0.3]]))


def test_layers_may_route_differently() -> None:
    config = MoEConfig(num_experts=4, layers={3: {"router": "hash", "experts_per_token": 3}})
    tokens, x = tokens_of([TEXT] * 2, keys=[5, 5]), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    usual, odd = (Router(config.for_layer(i), 4, layer=i, names=NAMES) for i in (1, 3))
    torch.nn.init.normal_(usual.weight)
    torch.nn.init.normal_(odd.weight)
    assert usual(x, tokens).expert_ids_nK.shape == (2, 2)
    ids = odd(x, tokens).expert_ids_nK.tolist()
    assert len(ids[0]) == 3 and ids[0] == ids[1]  # one key, one choice, whatever the content


def route_any(name: str, n: int, num_experts: int, top_k: int) -> tuple[Router, Routing]:
    router = identity_router(num_experts, router=name, experts_per_token=top_k, task_conditioned=name != "hash")
    x = torch.randn(n, num_experts, generator=torch.Generator().manual_seed(0))
    return router, router(x, tokens_of([IMAGE, TEXT, AUDIO, IMAGE][:n]))


@pytest.mark.parametrize("name", sorted(ROUTERS.builtin))
def test_no_tokens_route_to_empty_sums_and_gradients_of_zeros(name: str) -> None:
    router, routing = route_any(name, 0, 4, 2)
    assert routing.weights_nK.shape[0] == 0
    assert not routing.stats.flatten().any()
    routing.weights_nK.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in router.parameters())


def test_coactivation_counts_pairs_alike_for_few_choices_and_for_many() -> None:
    # Three experts of eight are listed as pairs; six of eight use a matrix product.
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    modalities = [IMAGE, TEXT] * 20
    for top_k in (3, 6):
        routing = identity_router(8, experts_per_token=top_k, capacity_factor=1.0)(x, tokens_of(modalities))
        expected = torch.zeros(3, 8, 8)
        for ids, kept, m in zip(routing.expert_ids_nK.tolist(), routing.kept_nK.tolist(), modalities, strict=True):
            served = [e for e, k in zip(ids, kept, strict=True) if k]
            for a in served:
                for b in served:
                    expected[m, a, b] += a != b
        assert torch.equal(routing.stats.coactivation_MEE, expected)


@pytest.mark.parametrize("name", sorted(ROUTERS.builtin))
def test_every_expert_may_be_chosen_at_once(name: str) -> None:
    _, routing = route_any(name, 4, 4, 4)
    assert [sorted(row) for row in routing.expert_ids_nK.tolist()] == [[0, 1, 2, 3]] * 4
    torch.testing.assert_close(routing.weights_nK.sum(-1), torch.ones(4))
    assert routing.stats.counts_ME.sum().item() == 16


@pytest.mark.parametrize("name", sorted(ROUTERS.builtin))
def test_every_parameter_of_every_router_gets_a_gradient(name: str) -> None:
    router, routing = route_any(name, 4, 8, 2)
    routing.weights_nK[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in router.parameters())
    learns = router.weight.grad.abs().sum() > 0
    assert bool(learns) == (name != "hash")


def test_routers_decide_in_fp32_whatever_the_type_of_the_tokens() -> None:
    router = identity_router(8)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = router(x, tokens_of([0] * 4))
    assert routing.weights_nK.dtype == torch.float32
    assert torch.equal(routing.weights_nK, router(x.float(), tokens_of([0] * 4)).weights_nK)


def test_active_experts_are_balanced_while_others_are_dormant() -> None:
    """Loads of 6, 2 and 2 of 10 all exceed 10 / 8, but not the mean of the three active ones."""
    router = Router(MoEConfig(num_experts=8, experts_per_token=1, wake_steps=1000,
                              bias_balancing={"rate": 0.1}), 8, layer=0, names=NAMES)  # fmt: skip
    router.dormancy[3:] = 32.0
    counts = torch.zeros(3, 2, 8)
    counts[IMAGE, 0, :3] = torch.tensor([6.0, 2.0, 2.0])
    stats = router(torch.zeros(0, 8), tokens_of([])).stats
    router.end_step(dataclasses.replace(stats, counts_MXE=counts))
    third = 0.1 / 3  # the mean of -0.1, 0.1 and 0.1
    expected = torch.tensor([[-0.1 - third, 0.1 - third, 0.1 - third, 0, 0, 0, 0, 0]])
    torch.testing.assert_close(router.bias.get_buffer("all"), expected)


def test_a_rate_of_zero_keeps_the_bias_and_goes_by_it() -> None:
    router = identity_router(2, experts_per_token=1, bias_balancing={"rate": 0.0})
    router.bias.get_buffer("all").copy_(torch.tensor([[0.0, 5.0]]))
    routing = router(torch.tensor([[1.0, 0.0]]), tokens_of([IMAGE]))
    router.end_step(routing.stats)
    assert routing.expert_ids_nK.tolist() == [[1]]
    assert router.bias.get_buffer("all").tolist() == [[0.0, 5.0]]
