"""How good the probabilities of classes are: their order by the area under the ROC curve, their size by the expected
calibration error.

Shapes: N rows, C classes.
"""

from __future__ import annotations

import numpy as np

from mmmoe_pretrain.evaluate.retrieval import Z95

BINS = 15  # as in Guo et al.
RESAMPLES = 200


def auroc(scores_N: np.ndarray, positive_N: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The probability that a positive row has a higher score than another (ties count half), and its 95% interval by
    the variance of DeLong et al. (Biometrics 44, 1988), within 0 and 1. Both kinds of rows must be there; with one
    row of a kind its part of the variance is unknown and left out."""
    scores_N = np.asarray(scores_N, dtype=np.float64)
    positive, negative = scores_N[positive_N], scores_N[~positive_N]
    assert len(positive) and len(negative)
    of_positive = _below(negative, positive) / len(negative)
    of_negative = 1 - _below(positive, negative) / len(positive)
    value = float(of_positive.mean())
    variance = sum(its.var(ddof=1) / len(its) for its in (of_positive, of_negative) if len(its) > 1)
    half = Z95 * float(variance) ** 0.5
    return value, (max(0.0, value - half), min(1.0, value + half))


def _below(many: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How many of ``many`` are below each value; equal ones count half."""
    ordered = np.sort(many)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2


def probabilities(logits_NC: np.ndarray) -> np.ndarray:
    """float64 [N, C]."""
    shifted = logits_NC.astype(np.float64) - logits_NC.max(axis=1, keepdims=True)
    powers = np.exp(shifted)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def calibration_error(probabilities_NC: np.ndarray, labels_N: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The expected calibration error (Guo et al., arXiv 1706.04599): over bins of the probability of the most
    probable class, the distance between its mean and the share of right rows, weighed by rows. The 95% interval is
    of resampled rows. The error is above 0 also of true probabilities, the more so the fewer rows there are."""
    top_N = probabilities_NC.max(axis=1)
    right_N = probabilities_NC.argmax(axis=1) == labels_N
    rng, count = np.random.default_rng(0), len(top_N)
    draws = [rng.integers(0, count, count) for _ in range(RESAMPLES)]
    low, high = np.quantile([_error(top_N[rows], right_N[rows]) for rows in draws], (0.025, 0.975))
    return _error(top_N, right_N), (float(low), float(high))


def _error(top_N: np.ndarray, right_N: np.ndarray) -> float:
    bin_N = np.minimum((top_N * BINS).astype(np.int64), BINS - 1)
    gaps = np.bincount(bin_N, weights=top_N - right_N, minlength=BINS)
    return float(np.abs(gaps).sum() / len(top_N))
