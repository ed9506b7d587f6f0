"""Areas under ROC curves and calibration errors: by hand, by enumeration, and against scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mmmoe_pretrain.evaluate.probabilities import auroc, calibration_error, probabilities


def test_the_area_is_the_share_of_pairs_in_order() -> None:
    """Positives 0.8, 0.4 and negatives 0.4, 0.1: three pairs in order, one tie, so 3.5 of 4."""
    value, (low, high) = auroc(np.array([0.8, 0.4, 0.4, 0.1]), np.array([True, True, False, False]))
    assert value == pytest.approx(3.5 / 4)
    # placements: positives 1 and 3/4, negatives 3/4 and 1; both variances are 1/32
    assert (value - low) == pytest.approx(1.959964 * (1 / 32 / 2 + 1 / 32 / 2) ** 0.5, rel=1e-5)
    assert high == 1.0


def test_it_is_that_of_scikit_learn_and_its_variance_that_of_the_u_statistic() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="needs the extra dev")
    rng = np.random.default_rng(0)
    positive = rng.random(60) < 0.3
    scores = np.round(rng.normal(size=60) + positive, 1)  # with ties
    value, (low, _) = auroc(scores, positive)
    assert value == pytest.approx(metrics.roc_auc_score(positive, scores))
    x, y = scores[positive], scores[~positive]
    won = np.array([[1.0 if a > b else 0.5 * (a == b) for b in y] for a in x])
    variance = won.mean(axis=1).var(ddof=1) / len(x) + won.mean(axis=0).var(ddof=1) / len(y)
    assert value - low == pytest.approx(1.959964 * variance**0.5, rel=1e-5)


def test_intervals_hold_the_true_area_about_95_times_of_100() -> None:
    """Normal scores one deviation apart have the area Phi(1 / sqrt 2) = 0.7602."""
    rng, held = np.random.default_rng(1), 0
    positive = np.arange(120) < 50
    for _ in range(300):
        _, (low, high) = auroc(rng.normal(size=120) + positive, positive)
        held += low <= 0.76025 <= high
    assert 0.91 <= held / 300 <= 0.98


def test_the_calibration_error_by_hand() -> None:
    """Two bins: 0.9 twice, of which one is right (gap 0.4), and 0.6 twice, both right (gap 0.4)."""
    found = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    error, (low, high) = calibration_error(found, np.array([0, 1, 1, 1]))
    assert error == pytest.approx(0.4) and low <= error <= high


def test_true_probabilities_are_calibrated() -> None:
    rng = np.random.default_rng(2)
    found = probabilities(rng.normal(size=(20_000, 3)).astype(np.float32) * 2)
    labels = np.array([rng.choice(3, p=row) for row in found])
    assert calibration_error(found, labels)[0] < 0.02
    assert calibration_error(found, (labels + 1) % 3)[0] > 0.3
    for shift in (0.0, 1e4):  # no overflow
        np.testing.assert_allclose(probabilities(np.array([[shift, shift]])), [[0.5, 0.5]])


def test_rows_of_one_kind_twice_do_not_change_the_area() -> None:
    scores = np.array([0.1, 0.5, 0.7, 0.3])
    for positive in itertools.product([True, False], repeat=4):
        mask = np.array(positive)
        if mask.any() and not mask.all():
            twice = auroc(np.repeat(scores, 2), np.repeat(mask, 2))[0]
            assert auroc(scores, mask)[0] == pytest.approx(twice)
