"""Perplexities by hand."""

import math

import numpy as np
import pytest

from mmmoe_pretrain.evaluate.perplexity import perplexity, unigram_perplexity


def test_perplexity_weighs_tokens_not_captions() -> None:
    # Caption 1: 1 token at log 2; caption 2: 3 tokens at log 4 each: mean (log 2 + 3 log 4) / 4.
    value, (low, high) = perplexity(np.array([math.log(2), 3 * math.log(4)]), np.array([1, 3]))
    assert value == pytest.approx(2 ** (7 / 4))
    assert low < value < high


def test_uniform_model_has_the_vocabulary_as_perplexity_and_no_spread() -> None:
    tokens = np.array([2, 5, 1])
    value, interval = perplexity(math.log(64) * tokens, tokens)
    assert value == pytest.approx(64)
    assert interval == pytest.approx((64, 64))


def test_interval_covers_the_truth_at_its_rate() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        tokens = rng.integers(1, 10, size=60)
        nll = tokens * (2.0 + rng.normal(size=60))  # each caption has its own difficulty; mean 2
        _, (low, high) = perplexity(nll, tokens)
        covered += low <= math.exp(2.0) <= high
    # Binomial(400, 0.95) has standard deviation 4.4; the ratio estimator is slightly narrow.
    assert 360 <= covered <= 396


def test_unigram_perplexity_by_hand() -> None:
    # Train counts 3, 1, 0 smoothed: 4/7, 2/7, 1/7. Held out: token 0 twice, token 2 once.
    expected = ((4 / 7) ** 2 * (1 / 7)) ** (-1 / 3)
    assert unigram_perplexity(np.array([2, 0, 1]), np.array([3, 1, 0])) == pytest.approx(expected)


def test_a_model_that_diverged_has_an_infinite_perplexity() -> None:
    """exp(800) is no float."""
    assert perplexity(np.array([800.0, 800.0]), np.array([1, 1])) == (math.inf, (math.inf, math.inf))
