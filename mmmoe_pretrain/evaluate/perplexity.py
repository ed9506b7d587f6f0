"""Caption perplexity, and the unigram perplexity that stands beside it.

Owns the arithmetic. Which captions there are comes from ``features.py``.

Shapes: G captions (fused segments), V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np

from mmmoe_pretrain.evaluate.retrieval import Z95


def perplexity(nll_G: np.ndarray, tokens_G: np.ndarray) -> tuple[float, tuple[float, float]]:
    """exp of the mean negative log-likelihood of a token, and its 95% interval.

    ``nll_G`` sums over a caption's tokens. The interval treats captions, not tokens, as independent
    (the ratio estimator's standard error), since the tokens of one caption hang together.
    """
    total = int(tokens_G.sum())
    if total == 0:
        raise ValueError(
            "perplexity over no tokens is undefined; the held-out rows need a text behind an image or audio"
        )
    mean = float(nll_G.sum()) / total
    residual_G = nll_G - mean * tokens_G
    groups = len(nll_G)
    correction = groups / (groups - 1) if groups > 1 else 1.0
    error = math.sqrt(correction * float((residual_G**2).sum())) / total
    return math.exp(mean), (math.exp(mean - Z95 * error), math.exp(mean + Z95 * error))


def unigram_perplexity(heldout_V: np.ndarray, train_V: np.ndarray) -> float:
    """Perplexity of held-out token counts under the training frequencies, add-one smoothed."""
    if heldout_V.sum() == 0:
        raise ValueError("unigram perplexity over no held-out tokens is undefined; give at least one")
    log_probability_V = np.log(train_V + 1.0) - math.log(float(train_V.sum()) + len(train_V))
    return math.exp(-float((heldout_V * log_probability_V).sum()) / float(heldout_V.sum()))
