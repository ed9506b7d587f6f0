"""Sources are mixed exactly, block by block and stage by stage."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mmmoe_pretrain.data.order.mix import Mix, Stage, block_counts


def test_shares_hold_in_every_block_of_every_lane_and_numbers_rise() -> None:
    lanes, rows = 3, 40
    mix = Mix([Stage((5, 3, 2))], lanes, [lanes] * 3, seed=3)
    lane, row = np.divmod(np.arange(lanes * rows), rows)
    drawn, number = mix.at(lane, row)
    source = drawn.reshape(lanes, rows)
    for block in source.reshape(-1, 10):
        assert Counter(block.tolist()) == {0: 5, 1: 3, 2: 2}
    assert len({tuple(block) for block in source.reshape(-1, 10).tolist()}) > 8  # each in its own order
    for one in range(lanes):
        for s, count in enumerate((20, 12, 8)):
            assert number[(lane == one) & (drawn == s)].tolist() == list(range(count))


def test_numbers_go_on_over_stages() -> None:
    # 2 blocks of 1:1, one block of source 1 alone, then source 0 alone
    mix = Mix([Stage((1, 1), 2), Stage((0, 3), 1), Stage((1, 0))], 2, [2, 2], seed=0)
    row = np.arange(12)
    source, number = mix.at(np.zeros_like(row), row)
    assert sorted(source[:2].tolist()) == sorted(source[2:4].tolist()) == [0, 1]
    assert source[4:].tolist() == [1] * 3 + [0] * 5
    assert number[4:].tolist() == [2, 3, 4, 2, 3, 4, 5, 6]


def test_the_end_of_all_data_is_an_error() -> None:
    mix = Mix([Stage((1, 1), 2)], 8, [8, 8], seed=0)
    assert mix.rows == 4
    with pytest.raises(ValueError, match="the data ends after 32 samples"):
        mix.at(np.asarray([0]), np.asarray([4]))


def test_block_counts_are_the_smallest_that_are_exact() -> None:
    assert block_counts([1.0]) == (1,)
    assert block_counts([2.0, 2.0]) == (1, 1)
    assert block_counts([0.7, 0.3, 0.0]) == (7, 3, 0)
    assert block_counts([1 / 3, 2 / 3]) == (1, 2)


def test_awkward_weights_are_rounded_to_a_bounded_block() -> None:
    weights = [np.pi, np.e, 0.123456789]
    for longest in (256, 4096):
        counts = np.array(block_counts(weights, longest))
        assert counts.sum() <= longest + len(weights)
        np.testing.assert_allclose(counts / counts.sum(), np.array(weights) / sum(weights), atol=2e-3)
    assert block_counts([1.0, 1e-9]) == (1, 0)
    assert block_counts([1.0, 0.3, 1e-5]) == (10, 3, 0)  # what gets no place makes the others no coarser
    assert block_counts([1.0, 2.0, 2.0], longest=1) == (0, 1, 0)  # some place there is
