"""Noise that decides and weighs, with values derived by hand."""

import dataclasses
import math

import torch

from mmmoe_pretrain.moe.routers.noisy_top_k import noisy_top_k
from mmmoe_pretrain.moe.routing import MASKED
from tests.moe.routing_inputs import identity_router, inputs_of, logs, tokens_of

P = [[0.5, 0.3, 0.2]]
NORMAL = torch.tensor([[math.log(0.4), 0.0, math.log(2.5)]])  # turns P into 0.2, 0.3, 0.5


def noisy(logits: torch.Tensor, std: torch.Tensor, normal: torch.Tensor, **settings: object):
    inputs = inputs_of(logits, router="noisy_top_k", **settings)
    return noisy_top_k(dataclasses.replace(inputs, noise_std_nE=std, normal_nE=normal))


def test_the_noisy_logits_decide_and_weigh() -> None:
    choice = noisy(logs(P), torch.ones(1, 3), NORMAL)
    assert choice.expert_ids_nK.tolist() == [[2, 1]]
    torch.testing.assert_close(choice.weights_nK, torch.tensor([[0.5 / 0.8, 0.3 / 0.8]]))
    torch.testing.assert_close(choice.log_p_nE.exp(), torch.tensor([[0.2, 0.3, 0.5]]))


def test_the_noise_learns_its_size() -> None:
    std = torch.ones(1, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(noisy(logs(P), std, NORMAL, experts_per_token=1).weights_nK.sum(), std)
    # d p_2 / d std_j = normal_j p_2 (1[j = 2] - p_j), with p = 0.2, 0.3, 0.5
    expected = torch.tensor([[math.log(0.4) * 0.5 * -0.2, 0.0, math.log(2.5) * 0.5 * 0.5]])
    torch.testing.assert_close(gradient, expected)


def test_noise_lifts_no_expert_over_the_mask() -> None:
    logits = torch.tensor([[MASKED, math.log(0.6), math.log(0.4)]])
    groups = ({"num_experts": 1, "modalities": ("text",)}, {"num_experts": 2})
    choice = noisy(logits, torch.full((1, 3), 1e3), torch.tensor([[9.0, 0.0, 0.0]]), expert_groups=groups)
    assert choice.expert_ids_nK.tolist() == [[1, 2]]
    torch.testing.assert_close(choice.weights_nK, torch.tensor([[0.6, 0.4]]))


def test_the_standard_deviation_is_a_softplus_of_the_token() -> None:
    router = identity_router(3, router="noisy_top_k")
    with torch.no_grad():
        router.noise_weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]))
    x = torch.tensor([[0.3, 0.1, -0.2]])
    router.begin_step(7)
    inputs = router._inputs(x, x, tokens_of([0]), router._generator(0, x.device))
    expected = [math.log1p(math.exp(0.3)), math.log(2.0), math.log1p(math.exp(-0.2))]
    torch.testing.assert_close(inputs.noise_std_nE, torch.tensor([expected]))
