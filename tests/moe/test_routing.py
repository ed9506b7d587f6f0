"""Capacity, with values derived by hand."""

import math

import pytest
import torch

from mmmoe_pretrain.moe.routing import expert_capacity, within_capacity


@pytest.mark.parametrize("factor,tokens,top_k,experts,capacity", [
    (1.25, 10, 2, 8, 4),  # 3.125, rounded up
    (1.0, 8, 2, 4, 4),
    (1.1, 100, 1, 2, 55),  # 55.00000000000001 in floating point
    (0.1, 1, 1, 8, 1),
    (1.0, 0, 2, 8, 0),
])  # fmt: skip
def test_capacity_counts_every_choice(factor: float, tokens: int, top_k: int, experts: int, capacity: int) -> None:
    assert expert_capacity(factor, tokens, top_k, experts) == capacity


@pytest.mark.parametrize("ids,capacity,priority,kept", [
    # Expert 0: token 0's first choice, then token 1's second; expert 1: two first choices fill it.
    ([[0, 1], [1, 0], [1, 0]], 2, None, [[1, 0], [1, 1], [1, 0]]),
    # Expert 0: token 0 first (the least confident of all), then the second choice of token 2.
    ([[0, 1], [1, 0], [1, 0]], 2, [0.4, 0.5, 0.9], [[1, 0], [1, 0], [1, 1]]),
    ([[0], [0], [0]], 2, [0.5, 0.7, 0.6], [[0], [1], [1]]),
    ([[0], [0], [0]], 2, None, [[1], [1], [0]]),
    ([[0], [0], [0], [0]], 2, [math.nan, 0.5, math.nan, 0.0], [[0], [1], [0], [1]]),  # NaN goes last
    ([[0], [0], [0], [0]], 3, [math.nan, 0.5, math.nan, 0.0], [[1], [1], [0], [1]]),
])  # fmt: skip
def test_first_choices_come_before_second_ones_and_confident_tokens_before_others(
    ids: list[list[int]], capacity: int, priority: list[float] | None, kept: list[list[int]]
) -> None:
    priority_n = None if priority is None else torch.tensor(priority)
    assert within_capacity(torch.tensor(ids), capacity, priority_n).int().tolist() == kept


def test_equal_priorities_go_by_position() -> None:
    kept = within_capacity(torch.zeros(300, 1, dtype=torch.int64), capacity=2, priority_n=torch.ones(300))
    assert kept[:, 0].tolist() == [True, True] + [False] * 298


def test_no_tokens_need_no_room() -> None:
    assert within_capacity(torch.zeros(0, 2, dtype=torch.int64), 0, torch.zeros(0)).shape == (0, 2)
