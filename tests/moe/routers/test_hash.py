"""Routing by a fixed hash, against the same hash in Python's integers."""

import math

import pytest
import torch

from mmmoe_pretrain.moe.routers.hash import hash_route
from tests.moe.routing_inputs import IMAGE, TEXT, inputs_of, tokens_of


def mixed(value: int, multiplier: int) -> int:
    for _ in range(2):
        value = value * multiplier % 2**32
        value ^= value >> 16
    return value


def route(keys: list[int], modality: int, num_experts: int, top_k: int):
    tokens = tokens_of([modality] * len(keys), keys=keys)
    logits = torch.randn(len(keys), num_experts, generator=torch.Generator().manual_seed(0)).requires_grad_()
    return logits, hash_route(inputs_of(logits, tokens, router="hash", experts_per_token=top_k))


@pytest.mark.parametrize("modality", [IMAGE, TEXT])
def test_experts_follow_from_key_and_modality_alone(modality: int) -> None:
    keys = [0, 1, 2, 77, 130_000]
    coprime = [1, 5, 7, 11]  # to 12
    expected = []
    for key in keys:
        number = 3 * key + modality
        first = mixed(number, 0x9E3779B1) % 12
        stride = coprime[mixed(number, 0x85EBCA6B) % 4]
        expected.append([(first + step * stride) % 12 for step in range(3)])
    assert route(keys, modality, 12, 3)[1].expert_ids_nK.tolist() == expected


@pytest.mark.parametrize("choice", [0, 1])
def test_keys_spread_evenly_over_the_experts(choice: int) -> None:
    ids = route(list(range(8_000)), TEXT, 8, 2)[1].expert_ids_nK[:, choice]
    # 1,000 an expert, with a binomial standard deviation of 30: five of them.
    assert (torch.bincount(ids, minlength=8) - 1_000).abs().max() < 150


def test_experts_weigh_alike_and_the_router_gets_a_gradient_of_zeros() -> None:
    logits, choice = route([3, 4], IMAGE, 6, 4)
    assert choice.weights_nK.tolist() == [[0.25] * 4] * 2
    (gradient,) = torch.autograd.grad(choice.weights_nK.sum(), logits)
    assert not gradient.any()
    p = choice.log_p_nE.exp()  # the routing distribution is even over the chosen
    torch.testing.assert_close(p, torch.zeros(2, 6).scatter(1, choice.expert_ids_nK, 0.25))
    torch.testing.assert_close(-(p * choice.log_p_nE).sum(-1), torch.full((2,), math.log(4.0)))
