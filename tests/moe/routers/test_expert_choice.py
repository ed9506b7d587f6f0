"""Experts choose tokens: values derived by hand."""

import math

import pytest
import torch

from mmmoe_pretrain.moe.routers.expert_choice import expert_choice
from tests.moe.routing_inputs import IMAGE, TEXT, identity_router, inputs_of, logs, tokens_of

P = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.1, 0.9]]


def route(p: list[list[float]], **settings: object):
    return expert_choice(inputs_of(logs(p), router="expert_choice", **settings))


def test_every_expert_takes_its_most_probable_tokens() -> None:
    choice = route(P, experts_per_token=1)  # C = ceil(4 * 1 / 2) = 2
    assert choice.expert_ids_nK.tolist() == [[0, 1]] * 4
    assert choice.kept_nK.tolist() == [[True, False], [True, False], [False, True], [False, True]]
    torch.testing.assert_close(choice.weights_nK, torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.0, 0.3], [0.0, 0.9]]))
    torch.testing.assert_close(choice.priority_n, torch.tensor([0.9, 0.8, 0.7, 0.9]))


def test_the_capacity_factor_scales_what_an_expert_takes() -> None:
    choice = route(P, experts_per_token=1, capacity_factor=0.5)  # C = 1
    assert choice.kept_nK.tolist() == [[True, False], [False, False], [False, False], [False, True]]
    everything = route(P, experts_per_token=1, capacity_factor=8.0)  # C = 16 of 4 tokens
    assert everything.kept_nK.all()


@pytest.mark.parametrize("renormalize", [True, False])
def test_weights_are_probabilities_even_of_tokens_with_many_experts(renormalize: bool) -> None:
    choice = route(P, experts_per_token=2, renormalize=renormalize)  # C = 4: all tokens
    torch.testing.assert_close(choice.weights_nK, torch.tensor(P))


def test_an_expert_never_takes_a_token_that_may_not_choose_it() -> None:
    groups = ({"num_experts": 1, "modalities": ("image",)}, {"num_experts": 1})
    settings = {"router": "expert_choice", "experts_per_token": 1, "capacity_factor": 2.0, "expert_groups": groups}
    router = identity_router(2, **settings)  # C = ceil(2 * 3 / 2) = 3, and one image token
    routing = router(logs(P[:3]), tokens_of([TEXT, IMAGE, TEXT]))
    assert routing.kept_nK.tolist() == [[False, True], [True, True], [False, True]]
    torch.testing.assert_close(routing.weights_nK, torch.tensor([[0.0, 1.0], [0.8, 0.2], [0.0, 1.0]]))


def test_a_token_of_nan_takes_no_place_of_another() -> None:
    nan = [[math.nan, math.nan], *P]
    choice = route(nan, experts_per_token=1)  # C = ceil(5 / 2) = 3: all but the least probable of four
    assert choice.kept_nK.tolist() == [[False, False], [True, False], [True, True], [True, True], [False, True]]
    assert route(nan, experts_per_token=2).kept_nK.all()  # C = 5: there is room


def test_statistics_count_what_was_taken_and_nothing_as_dropped() -> None:
    router = identity_router(3, router="expert_choice", experts_per_token=1)
    p = [[0.45, 0.45, 0.1], [0.2, 0.2, 0.6]]
    stats = router(logs(p), tokens_of([IMAGE, TEXT])).stats
    assert stats.counts_ME.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert stats.dropped_M.tolist() == [0, 0, 0]
    assert stats.coactivation_MEE[IMAGE].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert not stats.coactivation_MEE[TEXT].any()
    torch.testing.assert_close(stats.probability_ME[TEXT], torch.tensor(p[1]))
