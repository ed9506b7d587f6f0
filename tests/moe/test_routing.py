"""Capacity, weights and the choice under a bias, with values derived by hand."""

import math

import pytest
import torch

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.moe.routing import MASKED, chosen_weights, expert_capacity, within_capacity
from tests.moe.routing_inputs import inputs_of


@pytest.mark.parametrize("factor,tokens,top_k,experts,capacity", [
    (1.25, 10, 2, 8, 4),  # 3.125, rounded up
    (1.0, 8, 2, 4, 4),
    (1.1, 100, 1, 2, 55),  # 55.00000000000001 in floating point
    (0.1, 1, 1, 8, 1),
    (1.0, 0, 2, 8, 0),
])  # fmt: skip
def test_capacity_counts_every_choice(factor: float, tokens: int, top_k: int, experts: int, capacity: int) -> None:
    assert expert_capacity(factor, tokens, top_k, experts) == capacity


def test_first_choices_are_placed_before_second_choices() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [1, 0]])
    kept = within_capacity(ids, capacity=2, priority_n=None)
    # Expert 0: token 0's first choice, then token 1's second; expert 1: two first choices fill it.
    assert kept.tolist() == [[True, False], [True, True], [True, False]]


def test_batch_priority_gives_room_to_the_most_confident_tokens() -> None:
    ids = torch.tensor([[0], [0], [0]])
    kept = within_capacity(ids, capacity=2, priority_n=torch.tensor([0.5, 0.7, 0.6]))
    assert kept.tolist() == [[False], [True], [True]]


def test_a_confident_tokens_second_choice_waits_for_all_first_choices() -> None:
    ids = torch.tensor([[0, 1], [1, 0], [1, 0]])
    kept = within_capacity(ids, capacity=2, priority_n=torch.tensor([0.4, 0.5, 0.9]))
    # Expert 0: token 0 first (the least confident of all), then the second choice of token 2.
    assert kept.tolist() == [[True, False], [True, False], [True, True]]


def test_a_token_of_nan_goes_last_under_batch_priority() -> None:
    ids = torch.tensor([[0], [0], [0], [0]])
    priority = torch.tensor([math.nan, 0.5, math.nan, 0.0])
    assert within_capacity(ids, capacity=2, priority_n=priority).flatten().tolist() == [False, True, False, True]
    assert within_capacity(ids, capacity=3, priority_n=priority).flatten().tolist() == [True, True, False, True]


def test_equal_priorities_go_by_position() -> None:
    kept = within_capacity(torch.zeros(300, 1, dtype=torch.int64), capacity=2, priority_n=torch.ones(300))
    assert kept[:, 0].tolist() == [True, True] + [False] * 298


def test_position_decides_without_batch_priority() -> None:
    kept = within_capacity(torch.tensor([[0], [0], [0]]), capacity=2, priority_n=None)
    assert kept.tolist() == [[True], [True], [False]]


def test_no_tokens_need_no_room() -> None:
    assert within_capacity(torch.zeros(0, 2, dtype=torch.int64), 0, torch.zeros(0)).shape == (0, 2)


def test_weights_are_divided_by_their_sum_unless_there_is_one_choice() -> None:
    log_scores = torch.tensor([[0.6, 0.2]]).log()
    renormalised = chosen_weights(log_scores, MoEConfig(num_experts=4))
    torch.testing.assert_close(renormalised, torch.tensor([[0.75, 0.25]]))
    as_they_are = chosen_weights(log_scores, MoEConfig(num_experts=4, renormalize=False))
    torch.testing.assert_close(as_they_are, torch.tensor([[0.6, 0.2]]))
    single = chosen_weights(log_scores[:, :1], MoEConfig(num_experts=4, experts_per_token=1))
    torch.testing.assert_close(single, torch.tensor([[0.6]]))


def test_no_bias_lifts_an_expert_over_the_mask() -> None:
    groups = ({"num_experts": 1, "modalities": ("text",)}, {"num_experts": 2})
    inputs = inputs_of(torch.tensor([[MASKED, 0.0, 0.0]]), bias=[5.0, 0.0, -3.0], expert_groups=groups)
    assert inputs.for_choice(torch.tensor([[0.0, 0.5, 0.5]])).tolist() == [[-math.inf, 0.5, -2.5]]


def test_scores_for_the_choice_carry_no_gradient() -> None:
    assert not inputs_of(torch.zeros(1, 3)).for_choice(torch.zeros(1, 3, requires_grad=True)).requires_grad
