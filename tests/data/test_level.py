"""Tokens are level over the ranks, and no sample is lost or read twice for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmmoe_pretrain.data.order.level import level


@given(ranks=st.integers(1, 9), each=st.integers(1, 9), data=st.data())
@settings(max_examples=80, deadline=None)
def test_every_sample_has_one_rank_and_ranks_have_equal_counts(ranks: int, each: int, data: st.DataObject) -> None:
    tokens = data.draw(arrays.arrays(np.int64, ranks * each, elements=st.integers(0, 10**6)))
    fixed = data.draw(arrays.arrays(np.bool_, ranks * each))
    members = level(tokens, ranks, fixed)
    assert sorted(members.ravel().tolist()) == list(range(ranks * each))
    assert (np.diff(members, axis=1) > 0).all()
    own = members // each == np.arange(ranks)[:, None]
    assert own[fixed[members]].all()
    before = tokens.reshape(ranks, each).sum(axis=1)
    assert tokens[members].sum(axis=1).max() <= before.max()


def test_one_exchange_that_levels_two_ranks_is_found() -> None:
    # 10 + 7 + 1 against 1 + 2 + 3: exchanging the 7 for the 1 leaves 12 and 12
    assert level(np.asarray([10, 7, 1, 1, 2, 3]), 2).tolist() == [[0, 2, 3], [1, 4, 5]]
    # where the 7 stays: the 10 for a 3 (11 and 13), then a 2 for a 1
    fixed = np.arange(6) == 1
    assert level(np.asarray([10, 7, 1, 1, 2, 3]), 2, fixed).tolist() == [[1, 4, 5], [0, 2, 3]]


def test_level_ranks_exchange_nothing() -> None:
    assert level(np.full(12, 5), 3).tolist() == np.arange(12).reshape(3, 4).tolist()


@pytest.mark.parametrize("ranks, each", [(2, 8), (8, 8), (64, 8), (64, 32), (1000, 32)])
def test_the_longest_rank_of_a_blend_is_within_3_percent_of_the_mean(ranks: int, each: int) -> None:
    """Images of 196 tokens with texts, short texts, clips of up to 400 tokens, and documents with a long tail."""
    rng = np.random.default_rng(0)
    worst = []
    for _ in range(5):
        n = ranks * each
        kinds = np.stack([
            196 + rng.integers(5, 80, n), rng.lognormal(4, 1, n), rng.uniform(20, 400, n),
            np.minimum(rng.lognormal(6.3, 0.8, n), 1024),
        ])  # fmt: skip
        tokens = kinds[rng.choice(4, n, p=[0.5, 0.2, 0.2, 0.1]), np.arange(n)].astype(np.int64)
        load = tokens[level(tokens, ranks)].sum(axis=1)
        worst.append(load.max() / load.mean())
    assert max(worst) < 1.03
