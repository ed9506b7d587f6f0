"""The router of a layer: gates, masks, noise, tasks, capacity and what differs by layer."""

import dataclasses
import math

import pytest
import torch

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.kinds import ROUTERS
from mmmoe_pretrain.moe.router import Router, laplace_gate
from tests.moe.routing_inputs import AUDIO, IMAGE, NAMES, TEXT, identity_router, logs, tokens_of

P = [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.25, 0.15]]


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
    assert laplace_gate(x[:0], w).shape == (0, 8)
    x[:8] = w
    # |x|^2 + |w|^2 - 2 x w of numbers around 16 is rounded at some 1e-6, and the root makes that 1e-3.
    torch.testing.assert_close(laplace_gate(x, w)[:8].diagonal(), torch.zeros(8), atol=0.01, rtol=0)


def test_routing_follows_the_named_gate() -> None:
    router = Router(MoEConfig(num_experts=2, experts_per_token=1, gate="laplace"), 2, layer=0, names=NAMES)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 10.0]]))
    routing = router(torch.tensor([[2.0, 2.0]]), tokens_of([0]))  # x . w: 6 and 20; |x - w|: sqrt 5 and sqrt 68
    assert routing.expert_ids_nK.tolist() == [[0]]
    expected = 1 / (1 + math.exp(5**0.5 - 68**0.5))
    torch.testing.assert_close(routing.weights_nK, torch.tensor([[expected]]))


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
    twin.layer = 3  # layers draw different noise
    assert not torch.equal(draw(twin, x), first)
    for seed in (6, -1, 2**63, 10**30):
        router.begin_step(seed)
        assert not torch.equal(draw(router, x), first)


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


@pytest.mark.parametrize("task_input", ["added", "alone"])
def test_tasks_that_are_not_named_are_routed_by_their_tokens(task_input: str) -> None:
    """The logits of a token of the second task are those of its task, (0, 0, log 9), beside its own or alone."""
    router = identity_router(3, experts_per_token=1, task_conditioned=["captioning"], task_input=task_input)
    assert list(router.task_embedding) == ["captioning"]
    with torch.no_grad():
        router.task_embedding["captioning"][0] = torch.tensor([0.0, 0.0, math.log(9.0)])
    x = logs([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.98, 0.01, 0.01]]).requires_grad_()
    routing = router(x, tokens_of([IMAGE] * 3, tasks=[0, 1, 1]))
    together = {"added": [[0], [2], [0]], "alone": [[0], [2], [2]]}
    assert routing.expert_ids_nK.tolist() == together[task_input]
    expected = {"added": [0.5, 1.8 / 2.6, 0.98 / 1.08], "alone": [0.5, 9 / 11, 9 / 11]}
    torch.testing.assert_close(routing.weights_nK[:, 0], torch.tensor(expected[task_input]))
    routing.weights_nK.sum().backward()
    assert [bool(row.any()) for row in x.grad] == [True, *[task_input == "added"] * 2]


def test_the_bias_of_a_modality_moves_its_tokens_alone() -> None:
    router = identity_router(3, experts_per_token=1, bias_balancing={"rate": 0.1, "per_modality": True})
    router.bias.get_buffer("text").copy_(torch.tensor([[-1.0, 0.0, 0.0]]))
    routing = router(logs([P[0], P[0]]), tokens_of([IMAGE, TEXT]))
    assert routing.expert_ids_nK.tolist() == [[0], [1]]
    torch.testing.assert_close(routing.weights_nK, torch.tensor([[0.5], [0.3]]))


@pytest.mark.parametrize("tokens", [0, 4])
@pytest.mark.parametrize("name", sorted(ROUTERS.builtin))
def test_every_parameter_of_every_router_gets_a_gradient_and_zeros_without_tokens(name: str, tokens: int) -> None:
    router = identity_router(8, router=name, task_conditioned=name != "hash")
    x = torch.randn(tokens, 8, generator=torch.Generator().manual_seed(0))
    routing = router(x, tokens_of([IMAGE, TEXT, AUDIO, IMAGE][:tokens]))
    routing.weights_nK[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in router.parameters())
    if tokens:
        learns = [router.weight, *([] if router.noise_weight is None else [router.noise_weight])]
        assert {bool(p.grad.any()) for p in learns} == {name != "hash"}
    else:
        assert routing.weights_nK.shape[0] == 0 and not routing.stats.flatten().any()
        assert not any(p.grad.any() for p in router.parameters())


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
