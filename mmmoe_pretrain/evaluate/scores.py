"""Which held-out rows make which score.

Owns the choice of rows, queries and candidates:

* image and text, and zero-shot classes: the rows that ``evaluate.image_rows`` names, or all. Classes take the
  distinct images that carry a label.
* audio and text, image and audio: each kind of audio by itself, under its name in the rows (``speech_to_text``,
  ``effect_to_text``), or ``audio_to_text`` where they give none.
* Every retrieval score is within a language, whose rows are its candidates, and averaged over the languages with
  enough of them, each weighing the same.

A candidate is right if some row shows it with the query's text or, where an image takes part, with
the same picture. Being of one group is not enough: two pictures of apples are two answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmmoe_pretrain.batch import MODALITY_ID
from mmmoe_pretrain.config import RowField
from mmmoe_pretrain.evaluate import perplexity, retrieval, zero_shot
from mmmoe_pretrain.evaluate.features import HeldOut
from mmmoe_pretrain.evaluate.retrieval import Recall, effective_count, wilson_interval

KS = (1, 5, 10)
AUDIO_KINDS = ("speech", "effect")  # of docs/data_format.md


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
    unit: str = "share"  # or "perplexity"


Scored = tuple[list[Score], list[str]]  # and notes for a reader


def matching_rows(data: HeldOut, wanted: Mapping[RowField, Sequence[str]]) -> list[int]:
    """The rows whose fields have one of the values in ``wanted``; all of them where it is empty."""
    return [
        i for i, meta in enumerate(data.metas) if all(getattr(meta, key) in values for key, values in wanted.items())
    ]


def image_text_scores(data: HeldOut, rows: Sequence[int], least: int) -> Scored:
    """Recall of texts by images and of images by texts, of ``rows``."""
    return _retrieval(data, rows, "image", "text", least, {})


def audio_scores(data: HeldOut, other: str, least: int) -> Scored:
    """Recall between audio and ``other``, each kind of audio by itself."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for i, meta in enumerate(data.metas):
        kinds[meta.audio_kind if meta.audio_kind in AUDIO_KINDS else "audio"].append(i)
    parts = [_retrieval(data, rows, "audio", other, least, {"audio": kind}) for kind, rows in sorted(kinds.items())]
    return [s for scores, _ in parts for s in scores], [n for _, notes in parts for n in notes]


def _retrieval(
    data: HeldOut, rows: Sequence[int], one: str, other: str, least: int, names: Mapping[str, str]
) -> Scored:
    """Both directions, within each language that has ``least`` distinct items of modality ``one`` (where none has, in
    those with the most), then averaged. ``names``: modality -> its name in the scores, where that is another."""
    languages: dict[str, list[int]] = defaultdict(list)
    for i in rows:
        if data.content[one][i] and data.content[other][i]:
            languages[data.metas[i].language or "unknown"].append(i)
    if not languages:
        return [], []
    counts = {language: len({data.content[one][i] for i in of}) for language, of in languages.items()}
    most = max(counts.values())
    chosen = sorted(language for language, count in counts.items() if count >= min(least, most))
    name = {modality: names.get(modality, modality) for modality in (one, other)}
    notes = [] if most >= least or len(languages) == 1 else [
        f"no language has {least} distinct held-out items of {name[one]} with {other} "
        f"(evaluate.min_clips_per_language); these scores are of {', '.join(chosen)} ({most} items)"
    ]  # fmt: skip
    scores: list[Score] = []
    for query, target in ((one, other), (other, one)):
        metric = f"{name[query]}_to_{name[target]}"
        recalls = {language: _recalls(data, languages[language], query, target) for language in chosen}
        scores += [_score(f"{metric}_r{k}", [by_k[k] for by_k in recalls.values()]) for k in KS]
        if len(chosen) > 1:
            scores += [_score(f"{metric}_r10/{language}", [by_k[10]]) for language, by_k in recalls.items()]
    return scores, notes


def zero_shot_scores(
    data: HeldOut, rows: Sequence[int], encode: Callable[[list[str]], np.ndarray], prompt: str
) -> Scored:
    """Plain and balanced accuracy of the classes of the labelled rows."""
    seen = [i for i in reversed(rows) if data.metas[i].label and data.content["image"][i]]
    labelled = sorted({data.content["image"][i]: i for i in seen}.values())
    classes = sorted({data.metas[i].label for i in labelled})
    if len(classes) < 2:
        return [], [f"all labelled held-out images are {classes[0]!r}: zero-shot is left out"] if classes else []
    text_features = encode(zero_shot.class_texts(prompt, classes))
    similarity = data.features["image"][labelled] @ text_features.T
    result = zero_shot.classify(similarity, np.array([classes.index(data.metas[i].label) for i in labelled]))
    n, size = len(labelled), len(classes)
    plain = wilson_interval(result.accuracy, n)
    balanced = wilson_interval(result.balanced, effective_count(result.counts))
    return [
        Score("zero_shot_accuracy", result.accuracy, result.chance, result.majority, n, plain, size),
        Score("zero_shot_balanced", result.balanced, result.chance, result.chance, n, balanced, size),
    ], []


def caption_scores(data: HeldOut, train_V: np.ndarray | None) -> Scored:
    """Perplexity of all captions, and of those behind each kind of prefix."""
    captions = data.captions
    if captions.targets_V.sum() == 0:
        return [], []
    vocab_size = len(captions.targets_V)
    unigram = None if train_V is None else perplexity.unigram_perplexity(captions.targets_V, train_V)
    everything = np.ones(len(captions.nll_G), dtype=bool)
    kinds: dict[str, tuple[np.ndarray, float | None]] = {"caption_perplexity": (everything, unigram)}
    for prefix in ("image", "audio"):
        of_kind = captions.prefix_G == MODALITY_ID[prefix]
        if of_kind.any() and not of_kind.all():
            kinds[f"caption_perplexity/{prefix}"] = (of_kind, None)
    scores = []
    for metric, (of_kind, majority) in kinds.items():
        value, interval = perplexity.perplexity(captions.nll_G[of_kind], captions.tokens_G[of_kind])
        tokens = int(captions.tokens_G[of_kind].sum())
        scores.append(Score(metric, value, float(vocab_size), majority, tokens, interval, None, "perplexity"))
    return scores, []


def _recalls(data: HeldOut, rows: Sequence[int], query: str, target: str) -> dict[int, Recall]:
    """Recall at every k of one direction over ``rows``."""
    links = [[data.texts[i] or data.metas[i].identity for i in rows]]
    if "image" in (query, target):
        links.append([data.content["image"][i] for i in rows])
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
