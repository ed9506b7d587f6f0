"""Retrieval after linear CCA (cca.py), fitted on training samples and scored on the held-out rows as any other.

Of pairs that objectives of correlations train (``Objectives.correlated``) it is the score of the run, since their
vectors are alike up to a linear map. With ``evaluate.cca`` it stands beside that of pairs in one space, as
``image_to_text_cca_r1``: what the best linear map would make of the same vectors.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

from mmmoe_pretrain.config import EvaluateConfig
from mmmoe_pretrain.evaluate import cca, scores
from mmmoe_pretrain.evaluate.features import HeldOut, collect
from mmmoe_pretrain.evaluate.rows import HeldOutRows
from mmmoe_pretrain.evaluate.scores import Pair, Scored
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.objectives import Objectives

RIDGE = 1e-6  # against rounding; there are many samples for each dimension


def pairs_of(objectives: Objectives, settings: EvaluateConfig) -> tuple[Pair, ...]:
    """The pairs with scores after linear CCA."""
    return (*objectives.correlated, *(objectives.aligned if settings.cca else ()))


def sides_of_all(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Every representation of ``pairs`` once."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(pairs)))


def fit_samples(embedding_size: int) -> int:
    """How many training samples to fit on."""
    return max(2048, 16 * embedding_size)


def scores_of(data: HeldOut, model: MMMoE, rows: HeldOutRows) -> list[Scored]:
    """Of every pair; none, and a note, where the training shards cannot be read. ``data`` has their projections."""
    config, objectives = rows.config, model.objectives
    pairs = pairs_of(objectives, config.evaluate)
    if not pairs:
        return []
    if absent := rows.absent_training:
        return [([], [f"no score after linear CCA: it is fitted on the training shards, and {absent} is missing"])]
    batches = rows.training_batches(fit_samples(config.model.embedding_size), "linear CCA")
    train = collect(model, batches, sides_of_all(pairs))
    return [retrieval_scores(data, train, pair, config.evaluate, pair in objectives.correlated) for pair in pairs]


def retrieval_scores(data: HeldOut, train: HeldOut, pair: Pair, settings: EvaluateConfig, alone: bool) -> Scored:
    """Those of ``scores.retrieval_scores`` after linear CCA of the rows of ``train``. ``alone``: they are the only
    ones of the pair, and have the usual names."""
    first, second = pair
    both = [i for i in range(len(train.metas)) if train.content[first][i] and train.content[second][i]]
    size = train.projected[first].shape[1]
    if len(both) <= size:
        return [], [
            f"no score of {first} and {second} after linear CCA: {len(both)} of the {len(train.metas)} training "
            f"samples read have both, and {size} dimensions need more"
        ]
    found = cca.fit(train.projected[first][both], train.projected[second][both], (RIDGE, RIDGE))
    embedded = {
        first: found.embedded(data.projected[first]),
        second: found.embedded(data.projected[second], second=True),
    }
    made, notes = scores.retrieval_scores(replace(data, features={**data.features, **embedded}), pair, settings)
    note = f"{first} and {second} are compared after linear CCA, fitted on {len(both):,} training samples"
    if alone:
        return made, [*notes, *([note] if made else [])]
    renamed = [replace(score, metric=re.sub(r"_r(\d+)(?=/|$)", r"_cca_r\1", score.metric, count=1)) for score in made]
    return renamed, [f"where a name has _cca, {note}"] if made else []
