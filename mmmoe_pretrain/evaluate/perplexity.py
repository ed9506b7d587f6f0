"""Perplexity of predicted tokens, and of a unigram model of the training targets as its baseline.

Shapes: G segments with targets, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import numpy as np

from mmmoe_pretrain.batch import IGNORE, OF_TOKENIZER
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import eval_settings, training_samples
from mmmoe_pretrain.evaluate.features import name_of, vocabularies_of
from mmmoe_pretrain.evaluate.retrieval import Z95
from mmmoe_pretrain.modalities import Modalities

MAX_SAMPLES = 10_000  # of which training targets are counted


def perplexity(nll_G: np.ndarray, tokens_G: np.ndarray) -> tuple[float, tuple[float, float]]:
    """exp of the mean negative log-likelihood of a token, and its 95% interval.

    ``nll_G`` sums over a segment's targets. The interval treats segments, not tokens, as independent (the ratio
    estimator's standard error), since the tokens of one text depend on each other.
    """
    return _with_interval(*mean_of_sums(nll_G, tokens_G))


def balanced_perplexity(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, tuple[float, float]]:
    """As ``perplexity``, of the mean over ``parts`` (nll_G, tokens_G), each of which counts the same."""
    means, errors = zip(*(mean_of_sums(*part) for part in parts), strict=True)
    return _with_interval(float(np.mean(means)), math.sqrt(sum(error**2 for error in errors)) / len(parts))


def mean_of_sums(nll_G: np.ndarray, tokens_G: np.ndarray) -> tuple[float, float]:
    """The mean of a token, and its standard error (that of a ratio estimator)."""
    total = int(tokens_G.sum())
    assert total, "perplexity over no tokens"
    mean = float(nll_G.sum()) / total
    residual_G = nll_G - mean * tokens_G
    groups = len(nll_G)
    correction = groups / (groups - 1) if groups > 1 else 1.0
    return mean, math.sqrt(correction * float((residual_G**2).sum())) / total


def _with_interval(mean: float, error: float) -> tuple[float, tuple[float, float]]:
    return _exp(mean), (_exp(mean - Z95 * error), _exp(mean + Z95 * error))


def _exp(value: float) -> float:
    """Infinite where it is no float: a model that diverged has a likelihood, too."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def unigram_perplexity(heldout_V: np.ndarray, train_V: np.ndarray) -> float:
    """Perplexity of held-out token counts under the training frequencies, add-one smoothed."""
    log_probability_V = np.log(train_V + 1.0) - math.log(float(train_V.sum()) + len(train_V))
    return math.exp(-float((heldout_V * log_probability_V).sum()) / float(heldout_V.sum()))


def count_train_targets(
    config: RunConfig, modalities: Modalities, limit: int = MAX_SAMPLES
) -> tuple[dict[str, np.ndarray], int]:
    """The count of each token id as a target [V], by task (``features.name_of``); and the number of samples read."""
    # With a limit the lengths of images and audio decide which texts a document keeps.
    if config.data.max_tokens_per_document is None:
        modalities = _of_targets_alone(modalities)
    settings = eval_settings(config, modalities)
    sizes, tasks = vocabularies_of(config), settings.objectives.predicting
    counts = {
        name_of(task, vocabulary): np.zeros(sizes[vocabulary], dtype=np.int64)
        for task in tasks
        for vocabulary in settings.objectives[task].vocabularies
    }
    read = 0
    for i, sample in training_samples(config, modalities, limit, "counting the tokens"):
        read += 1
        for task in tasks:
            for segment in settings.objectives[task].segments(sample, settings.generator(i, task)):
                for part in segment.parts:
                    if part.targets is not None:
                        name = sample.items[part.item].modality
                        counts_V = counts[name_of(task, name if config.modalities[name].vocabulary else OF_TOKENIZER)]
                        ids = part.targets[part.targets != IGNORE]
                        counts_V += np.bincount(ids, minlength=len(counts_V))
    return counts, read


def _of_targets_alone(modalities: Modalities) -> Modalities:
    """The same, except that values without targets are not decoded: each is one example."""
    cheap = copy.copy(modalities)
    for name, modality in modalities.items():
        if not modality.predictable:
            example = modality.example(np.random.default_rng(0))
            stand_in = copy.copy(modality)
            setattr(stand_in, "decode", lambda data, rng=None, example=example: example)  # noqa: B010
            cheap[name] = stand_in
    return cheap
