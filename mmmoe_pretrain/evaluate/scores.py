"""Which held-out rows make which score.

Owns the choice of rows, queries and candidates:

* image and text: English rows of the subset ``named``; without one, one row of each group.
  Candidates are the distinct images and the distinct texts of these rows.
* speech and text, image and speech: within a language, candidates are what its clips show; averaged
  over the languages with enough clips, each language weighing the same.
* zero-shot classes: the distinct images of the image-text rows that carry a label.

A candidate is right if some row shows it with the query's text or, where an image takes part, with
the same picture. Being of one group is not enough: two pictures of apples are two answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmmoe_pretrain.batch import MODALITY_ID
from mmmoe_pretrain.evaluate import perplexity, retrieval, zero_shot
from mmmoe_pretrain.evaluate.features import HeldOut
from mmmoe_pretrain.evaluate.retrieval import Recall, effective_count, wilson_interval

KS = (1, 5, 10)


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


def image_text_rows(data: HeldOut) -> tuple[list[int], str]:
    """Rows of the image-text scores, and a note where they are not the English ``named`` ones."""
    both = [i for i in range(len(data.metas)) if data.content["image"][i] and data.content["text"][i]]
    named = [i for i in both if data.metas[i].subset == "named" and data.metas[i].language in ("en", "")]
    if named:
        return named, ""
    one_of_group: dict[str, int] = {}
    for i in sorted(both, key=lambda i: data.metas[i].language not in ("en", "")):
        one_of_group.setdefault(data.metas[i].own_group, i)
    note = (
        "no English held-out row of the subset 'named': image-text scores use one row of every group, "
        "English where there is one"
    )
    return sorted(one_of_group.values()), note if both else ""


def image_text_scores(data: HeldOut, rows: Sequence[int]) -> tuple[list[Score], list[str]]:
    """Recall of images by texts and of texts by images."""
    if not rows:
        return [], ["no held-out row has both image and text: these scores are left out"]
    scores = []
    for query, target in (("image", "text"), ("text", "image")):
        for k, recall in _recalls(data, rows, query, target).items():
            scores.append(_score(f"{query}_to_{target}_r{k}", [recall]))
    return scores, []


def speech_scores(data: HeldOut, other: str, min_clips: int) -> tuple[list[Score], list[str]]:
    """Recall between speech and ``other`` within a language, then averaged; notes where data is short."""
    spoken = _spoken_rows(data, other)
    if not spoken:
        return [], [f"no held-out row has both speech and {other}: these scores are left out"]
    clips = {language: len({data.content["audio"][i] for i in rows}) for language, rows in spoken.items()}
    most = max(clips.values())
    chosen = sorted(language for language, count in clips.items() if count >= min(min_clips, most))
    notes = []
    if most < min_clips:
        notes.append(
            f"no language has {min_clips} held-out clips with {other}; "
            f"speech scores are of {', '.join(chosen)} ({most} clips)"
        )
    scores: list[Score] = []
    for query, target in (("audio", other), (other, "audio")):
        name = f"{query}_to_{target}".replace("audio", "speech")
        recalls = {language: _recalls(data, spoken[language], query, target) for language in chosen}
        scores += [_score(f"{name}_r{k}", [by_k[k] for by_k in recalls.values()]) for k in KS]
        scores += [_score(f"{name}_r10/{language}", [by_k[10]]) for language, by_k in recalls.items()]
    return scores, notes


def zero_shot_scores(
    data: HeldOut, rows: Sequence[int], encode: Callable[[list[str]], np.ndarray], prompt: str
) -> tuple[list[Score], list[str]]:
    """Plain and balanced accuracy of the classes of the labelled rows."""
    image_rows = {data.content["image"][i]: i for i in reversed(rows) if data.metas[i].label}
    labelled = sorted(image_rows.values())
    classes = sorted({data.metas[i].label for i in labelled})
    if len(classes) < 2:
        return [], [f"{len(classes)} class of labelled images held out: zero-shot scores are left out"]
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


def caption_scores(data: HeldOut, train_V: np.ndarray | None) -> tuple[list[Score], list[str]]:
    """Perplexity of all captions, and of those behind each kind of prefix."""
    captions = data.captions
    if captions.targets_V.sum() == 0:
        return [], ["no held-out captions: caption_perplexity is left out"]
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


def _spoken_rows(data: HeldOut, other: str) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for i, meta in enumerate(data.metas):
        if data.content["audio"][i] and data.content[other][i] and meta.audio_kind == "speech":
            rows[meta.language or "unknown"].append(i)
    return rows


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
