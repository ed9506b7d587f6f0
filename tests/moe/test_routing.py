"""Routing decisions, capacity and statistics, with values derived by hand."""

import math

import pytest
import torch

from mmmoe_pretrain.config import MoEConfig
from mmmoe_pretrain.moe.routing import expert_capacity, softmax_top_k, within_capacity

LOG = [[math.log(p) for p in row] for row in ([0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.25, 0.15])]


def route(top_k: int = 2, **settings: object):
    config = MoEConfig(num_experts=3, experts_per_token=top_k, **settings)
    return softmax_top_k(torch.tensor(LOG), torch.tensor([0, 2, 2]), config)


def test_the_most_probable_experts_serve_with_renormalised_weights() -> None:
    routing = route()
    assert routing.expert_ids_nK.tolist() == [[0, 1], [2, 1], [0, 1]]
    expected = torch.tensor([[0.5 / 0.8, 0.3 / 0.8], [0.7 / 0.9, 0.2 / 0.9], [0.6 / 0.85, 0.25 / 0.85]])
    torch.testing.assert_close(routing.weights_nK, expected)


def test_a_single_choice_keeps_its_probability_so_that_the_router_learns() -> None:
    torch.testing.assert_close(route(top_k=1).weights_nK, torch.tensor([[0.5], [0.7], [0.6]]))


def test_capacity_counts_every_choice() -> None:
    assert expert_capacity(1.25, num_tokens=10, top_k=2, num_experts=8) == 4  # 3.125, rounded up


def test_first_choices_are_placed_before_second_choices() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [1, 0]])
    kept = within_capacity(ids, capacity=2, priority_n=None)
    # Expert 0: token 0's first choice, then token 1's second; expert 1: two first choices fill it.
    assert kept.tolist() == [[True, False], [True, True], [True, False]]


def test_batch_priority_gives_room_to_the_most_confident_tokens() -> None:
    ids = torch.tensor([[0], [0], [0]])
    kept = within_capacity(ids, capacity=2, priority_n=torch.tensor([0.5, 0.7, 0.6]))
    assert kept.tolist() == [[False], [True], [True]]


def test_position_decides_without_batch_priority() -> None:
    kept = within_capacity(torch.tensor([[0], [0], [0]]), capacity=2, priority_n=None)
    assert kept.tolist() == [[True], [True], [False]]


def test_dropped_choices_weigh_nothing_and_are_counted_by_modality() -> None:
    routing = route(top_k=1, capacity_factor=1.0, batch_priority=True)  # one place an expert
    assert routing.kept_nK.tolist() == [[False], [True], [True]]  # 0.6 beats 0.5 for expert 0
    assert routing.weights_nK[0].item() == 0
    assert routing.stats.dropped_M.tolist() == [1, 0, 0]


def test_statistics_are_sums_over_the_tokens_of_a_modality() -> None:
    stats = route().stats
    assert stats.tokens_M.tolist() == [1, 0, 2]
    assert stats.counts_ME.tolist() == [[1, 1, 0], [0, 0, 0], [1, 2, 1]]
    torch.testing.assert_close(stats.probability_ME[2], torch.tensor([0.7, 0.45, 0.85]))
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    assert stats.entropy_M[0].item() == pytest.approx(entropy, rel=1e-6)
    assert stats.z_sum.item() == pytest.approx(0.0, abs=1e-9)  # logsumexp of log-probabilities is 0


def test_statistics_survive_flattening() -> None:
    stats = route().stats
    again = stats.unflatten(stats.flatten())
    assert again.counts_ME.tolist() == stats.counts_ME.tolist()
    torch.testing.assert_close(again.probability_ME, stats.probability_ME)
    assert (again.z_sum, again.tokens_M.tolist()) == (stats.z_sum, stats.tokens_M.tolist())


def test_no_tokens_route_to_empty_sums() -> None:
    config = MoEConfig(num_experts=3, capacity_factor=1.0)
    routing = softmax_top_k(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), config)
    assert routing.expert_ids_nK.shape == (0, 2)
    assert routing.stats.tokens_M.tolist() == [0, 0, 0]
