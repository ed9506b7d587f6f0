"""The order of the data: complete, weighted, and a function of (seed, position) alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmoe_pretrain.data.order import MAX_BLOCK, MixOrder, block_counts, fold, permute


@given(size=st.integers(1, 2000), key=st.integers(0, 2**63))
@settings(max_examples=50, deadline=None)
def test_a_permutation_visits_everything_once(size: int, key: int) -> None:
    image = permute(np.arange(size), np.full(size, size), np.full(size, key, dtype=np.uint64))
    assert sorted(image.tolist()) == list(range(size))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    seed=st.integers(-5, 2**40),
)
@settings(max_examples=50, deadline=None)
def test_every_epoch_of_a_source_visits_each_sample_once(sizes: list[int], weights: list[int], seed: int) -> None:
    order = MixOrder(sizes, weights[: len(sizes)], seed)
    block = sum(block_counts(weights[: len(sizes)]))
    draws = order.at(np.arange(block * 120))  # whole blocks, so whole epochs are complete
    for source, size in enumerate(sizes):
        mine = draws.source == source
        complete = int(mine.sum()) // size
        for epoch in range(complete):
            seen = draws.index[mine & (draws.epoch == epoch)]
            assert sorted(seen.tolist()) == list(range(size))
        assert draws.epoch[mine].max() in {complete - 1, complete}


@given(seed=st.integers(0, 99), positions=st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_a_draw_depends_on_its_position_alone(seed: int, positions: list[int]) -> None:
    order = MixOrder([1000, 77], [1, 2], seed)
    together = order.at(np.array(positions))
    for i, position in enumerate(positions):
        alone = MixOrder([1000, 77], [1, 2], seed).at(np.array([position]))
        assert (alone.source[0], alone.epoch[0], alone.index[0]) == (
            together.source[i], together.epoch[i], together.index[i])  # fmt: skip


def test_weights_hold_in_every_block() -> None:
    draws = MixOrder([10, 10, 10], [0.5, 0.3, 0.2], seed=3).at(np.arange(1000))
    # 5 : 3 : 2 in each block of ten
    for start in range(0, 1000, 10):
        assert Counter(draws.source[start : start + 10].tolist()) == {0: 5, 1: 3, 2: 2}


def test_block_counts_are_the_smallest_that_are_exact() -> None:
    assert block_counts([1.0]) == [1]
    assert block_counts([2.0, 2.0]) == [1, 1]
    assert block_counts([0.7, 0.3]) == [7, 3]
    assert block_counts([1 / 3, 2 / 3]) == [1, 2]


def test_awkward_weights_are_rounded_to_a_bounded_block() -> None:
    weights = [np.pi, np.e, 0.123456789]
    counts = block_counts(weights)
    assert sum(counts) <= MAX_BLOCK + len(weights)
    np.testing.assert_allclose(np.array(counts) / sum(counts), np.array(weights) / sum(weights), atol=5e-4)


def test_a_weight_that_would_never_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="differ too much"):
        block_counts([1.0, 1e-9])


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        MixOrder([3, 0], [1, 1], 0)


def test_seeds_epochs_and_sources_are_shuffled_apart() -> None:
    size = 500
    first = MixOrder([size], [1], seed=0).at(np.arange(2 * size)).index
    other = MixOrder([size], [1], seed=1).at(np.arange(size)).index
    for a, b in ((first[:size], first[size:]), (first[:size], other), (first[:size], np.arange(size))):
        # equal places of two random permutations: 1 in the mean, Poisson
        assert (a == b).sum() < 8
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2  # standard deviation 1 / sqrt(500) = 0.045


def test_hashes_of_neighbours_are_unrelated() -> None:
    bits = np.unpackbits(fold(0, np.arange(4096)).view(np.uint8)).reshape(4096, 64)
    np.testing.assert_allclose(bits.mean(axis=0), 0.5, atol=0.05)  # six standard deviations
