"""The held-out rows of each score.

Owns the choice of rows, queries and candidates:

* Retrieval, of each pair of representations that an objective aligns, in both directions: ``image_to_text_r1``. Of
  the rows that ``evaluate.rows`` keeps; split by ``evaluate.by`` (a part has the name of its field's value, such as
  ``speech_to_text_r1``); within each value of ``evaluate.within``, averaged over those with enough items on both
  sides, each of which weighs the same.
* Zero-shot, of each representation that is aligned with one of texts: the distinct items that carry a label, among
  the class names of these items as texts.
* Accuracy, of each task with classes: of the distinct items whose label is one of them, among all classes.
* Perplexity, of each task that predicts tokens; also of each value of ``evaluate.within`` with enough segments
  (``captions_perplexity/de``), and with each of these weighing the same (``captions_perplexity_balanced``).

A candidate is correct if some row pairs it with the query, or with the query's text. The same group is not enough:
two images of apples are two answers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mmmoe_pretrain.config import EvaluateConfig
from mmmoe_pretrain.evaluate import perplexity, probabilities, retrieval
from mmmoe_pretrain.evaluate.features import HeldOut, Predicted
from mmmoe_pretrain.evaluate.retrieval import Recall, effective_count, wilson_interval

KS = (1, 5, 10)
BOTH_WAYS = ((0, 1), (1, 0))
Encode = Callable[[list[str]], np.ndarray]  # texts -> features [n, P]


@dataclass(frozen=True)
class Score:
    """One line of the report; ``value``, ``chance`` and ``majority`` in the unit of the metric."""

    metric: str
    value: float
    chance: float | None
    majority: float | None
    n: int
    interval: tuple[float, float]
    candidates: int | None = None
    unit: str = "share"  # or "perplexity", "cosine", "distance", "nats"


class ClassLabels(Protocol):
    """Of settings of an objective with classes: the ``field`` that has a sample's label, and the classes' names."""

    field: str

    @property
    def names(self) -> tuple[str, ...]: ...


Scored = tuple[list[Score], list[str]]  # and notes for a reader
Pair = tuple[str, str]  # of representations


def retrieval_scores(
    data: HeldOut, pair: Pair, settings: EvaluateConfig, ways: Sequence[tuple[int, int]] = BOTH_WAYS
) -> Scored:
    """Recall of each of the two by the other; ``ways``: query and target, as places in ``pair``."""
    scores: list[Score] = []
    notes: list[str] = []
    for names, rows in _parts(data, pair, _rows_of(data, pair, settings), settings.by):
        found, more = _within(data, pair, names, rows, settings, ways)
        scores, notes = scores + found, notes + more
    if not scores:
        wanted = _wanted(pair, settings)
        where = f" and {wanted} (evaluate.rows)" if wanted else ""
        notes.append(f"no held-out row has both {' and '.join(pair)}{where}: no score of them")
    return scores, notes


def zero_shot_scores(data: HeldOut, pair: Pair, encode: Encode, settings: EvaluateConfig) -> Scored:
    """Plain and balanced accuracy of the first of ``pair``, with class names as texts of the second."""
    source, target = pair
    rows = [i for i in _rows_of(data, pair, settings) if data.metas[i].label and data.content[source][i]]
    scores: list[Score] = []
    notes: list[str] = []
    for (name,), part in _parts(data, (source,), rows, settings.by):
        labelled = sorted({data.content[source][i]: i for i in reversed(part)}.values())
        classes = sorted({data.metas[i].label for i in labelled})
        if len(classes) < 2:
            notes.append(f"all labelled held-out rows with {name} are {classes[0]!r}: no zero-shot score of it")
            continue
        similarity = data.features[source][labelled] @ encode([settings.prompt.format(c) for c in classes]).T
        result = retrieval.nearest_class(similarity, np.array([classes.index(data.metas[i].label) for i in labelled]))
        n, size, metric = len(labelled), len(classes), f"{name}_to_{target}_zero_shot"
        plain = wilson_interval(result.accuracy, n)
        balanced = wilson_interval(result.balanced, effective_count(result.counts))
        scores += [
            Score(metric, result.accuracy, result.chance, result.majority, n, plain, size),
            Score(f"{metric}_balanced", result.balanced, result.chance, result.chance, n, balanced, size),
        ]
    return scores, notes


def class_scores(data: HeldOut, task: str, representation: str, settings: ClassLabels) -> Scored:
    """Of ``task``, whose classes are told apart by ``representation``: plain and balanced accuracy, the area under
    the ROC curve of each class against the others, and the expected calibration error (probabilities.py)."""
    numbers = {name: number for number, name in enumerate(settings.names)}
    labels = [numbers.get(meta.get(settings.field), -1) for meta in data.metas]
    content = data.content[representation]
    rows = sorted({(content[i], labels[i]): i for i in reversed(range(len(labels))) if content[i]}.values())
    rows = [i for i in rows if labels[i] >= 0]
    if not rows:
        field = settings.field
        return [], [f"no held-out row with {representation} has a class of {task} in the field {field}: no accuracy"]
    logits_NC, labels_N = data.class_logits[task][rows], np.array([labels[i] for i in rows])
    result = retrieval.nearest_class(logits_NC, labels_N)
    n, size, metric = len(rows), len(numbers), f"{task}_accuracy"
    plain = wilson_interval(result.accuracy, n)
    balanced = wilson_interval(result.balanced, effective_count(result.counts))
    return [
        Score(metric, result.accuracy, result.chance, result.majority, n, plain, size),
        Score(f"{metric}_balanced", result.balanced, result.chance, result.chance, n, balanced, size),
        *_of_probabilities(task, probabilities.probabilities(logits_NC), labels_N, settings.names),
    ], []


def _of_probabilities(task: str, found_NC: np.ndarray, labels_N: np.ndarray, names: Sequence[str]) -> list[Score]:
    """``TASK_auroc`` is the mean over classes, and so is half the width of its interval; of two classes it is that of
    the second."""
    classes = range(1, 2) if len(names) == 2 else range(len(names))
    areas = []
    for number in classes:
        positive_N = labels_N == number
        if 0 < positive_N.sum() < len(labels_N):
            value, interval = probabilities.auroc(found_NC[:, number], positive_N)
            areas.append(Score(f"{task}_auroc/{names[number]}", value, 0.5, 0.5, int(positive_N.sum()), interval))
    error, interval = probabilities.calibration_error(found_NC, labels_N)
    scores = [Score(f"{task}_calibration_error", error, None, None, len(labels_N), interval)]
    if areas:
        value = float(np.mean([score.value for score in areas]))
        half = float(np.mean([score.interval[1] - score.interval[0] for score in areas])) / 2
        within = (max(0.0, value - half), min(1.0, value + half))
        scores += [Score(f"{task}_auroc", value, 0.5, 0.5, len(labels_N), within), *areas]
    return scores


def perplexity_scores(
    task: str,
    found: Predicted,
    train_V: np.ndarray | None,
    modalities: Sequence[str],
    settings: EvaluateConfig | None = None,
) -> list[Score]:
    """Perplexity of all targets, of those in segments that begin with each modality, and of those of each value of
    ``settings.within``."""
    if not found.targets_V.any():
        return []
    vocab_size = len(found.targets_V)
    unigram = None if train_V is None else perplexity.unigram_perplexity(found.targets_V, train_V)
    parts = {f"{task}_perplexity": (np.ones(len(found.nll_G), dtype=bool), unigram)}
    if len(begins := np.unique(found.first_G).tolist()) > 1:
        parts |= {f"{task}_perplexity/{modalities[m]}": (found.first_G == m, None) for m in begins}
    values = _values_of(found, settings)
    parts |= {f"{task}_perplexity/{value}": (chosen_G, None) for value, chosen_G in values.items()}
    scores = []
    for metric, (chosen_G, majority) in parts.items():
        value, interval = perplexity.perplexity(found.nll_G[chosen_G], found.tokens_G[chosen_G])
        tokens = int(found.tokens_G[chosen_G].sum())
        scores.append(Score(metric, value, float(vocab_size), majority, tokens, interval, None, "perplexity"))
    if values:
        value, interval = perplexity.balanced_perplexity(
            [(found.nll_G[g], found.tokens_G[g]) for g in values.values()]
        )
        tokens = sum(int(found.tokens_G[chosen_G].sum()) for chosen_G in values.values())
        metric = f"{task}_perplexity_balanced"
        scores.append(Score(metric, value, float(vocab_size), None, tokens, interval, None, "perplexity"))
    return scores


def _values_of(found: Predicted, settings: EvaluateConfig | None) -> dict[str, np.ndarray]:
    """The segments of each value of ``settings.within`` with enough of them; nothing where there are not two."""
    if settings is None or not settings.within:
        return {}
    return values_with_enough([meta.get(settings.within) or "unknown" for meta in found.metas_G], settings)


def values_with_enough(values: Sequence[str], settings: EvaluateConfig) -> dict[str, np.ndarray]:
    """Where each of the ``values`` of the field ``settings.within`` is, if it is there often enough; nothing where
    there are not two such."""
    value_G = np.array(values)
    enough = [value for value in np.unique(value_G).tolist() if (value_G == value).sum() >= settings.min_items]
    return {value: value_G == value for value in enough} if len(enough) > 1 else {}


def _rows_of(data: HeldOut, pair: Pair, settings: EvaluateConfig) -> list[int]:
    wanted = _wanted(pair, settings)
    return [i for i, meta in enumerate(data.metas) if all(meta.get(key) in values for key, values in wanted.items())]


def _wanted(pair: Pair, settings: EvaluateConfig) -> dict[str, tuple[str, ...]]:
    """The values, by field, of the rows that ``evaluate.rows`` keeps for ``pair``, in either order."""
    by_pair = {frozenset(key.split("-")): wanted for key, wanted in settings.rows.items()}
    return by_pair.get(frozenset(pair), {})


def _parts(
    data: HeldOut, sides: Sequence[str], rows: Sequence[int], by: Mapping[str, str]
) -> list[tuple[tuple[str, ...], list[int]]]:
    """``rows`` split by the fields ``by`` of ``sides``, with the name that each side has there: the field's value, or
    its own where that is empty or another's."""
    parts: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i in rows:
        values = [data.metas[i].get(by[side]) if side in by else "" for side in sides]
        plain = [re.sub(r"\W+", "_", value.casefold()).strip("_") for value in values]
        free = [
            value if value and value not in data.content else side for side, value in zip(sides, plain, strict=True)
        ]
        parts[tuple(free if len(set(free)) == len(free) else sides)].append(i)
    return sorted(parts.items())


def _within(
    data: HeldOut,
    pair: Pair,
    names: Sequence[str],
    rows: Sequence[int],
    settings: EvaluateConfig,
    ways: Sequence[tuple[int, int]],
) -> Scored:
    """Each of ``ways``, within each value of the field ``evaluate.within`` that has enough distinct items (where none
    has, in those with the most), then averaged."""
    strata: dict[str, list[int]] = defaultdict(list)
    for i in rows:
        if all(data.content[side][i] for side in pair):
            strata[(data.metas[i].get(settings.within) or "unknown") if settings.within else ""].append(i)
    if not strata:
        return [], []
    counts = {value: min(len({data.content[side][i] for i in of}) for side in pair) for value, of in strata.items()}
    least, most = settings.min_items, max(counts.values())
    chosen = sorted(value for value, count in counts.items() if count >= min(least, most))
    notes = [] if most >= least or len(strata) == 1 else [
        f"no {settings.within} has {least} distinct held-out items of {' with '.join(names)} (evaluate.min_items); "
        f"these scores are of {', '.join(chosen)} ({most} items)"
    ]  # fmt: skip
    scores: list[Score] = []
    for query, target in ways:
        metric = f"{names[query]}_to_{names[target]}"
        recalls = {value: _recalls(data, strata[value], pair[query], pair[target]) for value in chosen}
        scores += [_score(f"{metric}_r{k}", [by_k[k] for by_k in recalls.values()]) for k in KS]
        if len(chosen) > 1:
            scores += [_score(f"{metric}_r10/{value}", [by_k[10]]) for value, by_k in recalls.items()]
    return scores, notes


def _recalls(data: HeldOut, rows: Sequence[int], query: str, target: str) -> dict[int, Recall]:
    """Recall at every k of one direction over ``rows``."""
    links = [data.texts[i] or data.metas[i].identity for i in rows]
    task = retrieval.pose([data.content[query][i] for i in rows], [data.content[target][i] for i in rows], links)
    index = np.asarray(rows)
    queries = data.features[query][index[task.query_rows]]
    candidates = data.features[target][index[task.candidate_rows]]
    similarity_QC = queries @ candidates.T
    return {k: retrieval.recall_at(k, similarity_QC, task.relevance_QC) for k in KS}


def _score(metric: str, recalls: Sequence[Recall]) -> Score:
    """The unweighted mean of strata; ``n`` counts the queries of all, candidates are of the largest."""
    queries = [recall.queries for recall in recalls]
    value = float(np.mean([recall.value for recall in recalls]))
    return Score(
        metric=metric,
        value=value,
        chance=float(np.mean([recall.chance for recall in recalls])),
        majority=float(np.mean([recall.majority for recall in recalls])),
        n=sum(queries),
        interval=wilson_interval(value, effective_count(queries)),
        candidates=max(recall.candidates for recall in recalls),
    )
