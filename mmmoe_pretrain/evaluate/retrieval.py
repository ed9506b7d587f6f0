"""Recall at k and zero-shot accuracy, their chance and their majority baselines, as pure functions of arrays.

Owns the counting. Which rows take part is decided in ``scores.py``.

A query is answered when any of its relevant candidates is among the first k. Equal scores count as in a random order:
a tie earns the probability that a relevant candidate comes early enough, so a model that scores all candidates
equally gets exactly chance.

Shapes: Q distinct queries, C distinct candidates or classes, N items to classify.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959964  # of a two-sided 95% interval


@dataclass(frozen=True)
class Task:
    """Distinct queries and candidates, each by the first row that shows it."""

    query_rows: np.ndarray  # int64 [Q]
    candidate_rows: np.ndarray  # int64 [C]
    relevance_QC: np.ndarray  # bool


@dataclass(frozen=True)
class Recall:
    """Recall at one k, with its baselines."""

    value: float
    chance: float
    majority: float
    queries: int
    candidates: int


def pose(queries: Sequence[str], candidates: Sequence[str], links: Sequence[str]) -> Task:
    """The retrieval task of rows that pair a query with a candidate.

    ``queries[i]`` and ``candidates[i]`` name the content of row i; rows of equal content are one
    item. A candidate is relevant if a row of it and a row of the query have the same link.
    """
    query_rows, query_of_row = _distinct(queries)
    candidate_rows, candidate_of_row = _distinct(candidates)
    relevance = np.zeros((len(query_rows), len(candidate_rows)), dtype=bool)
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, link in enumerate(links):
        rows_of[link].append(row)
    for rows in rows_of.values():
        relevance[np.ix_(query_of_row[rows], candidate_of_row[rows])] = True
    return Task(query_rows, candidate_rows, relevance)


def recall_at(k: int, similarity_QC: np.ndarray, relevance_QC: np.ndarray) -> Recall:
    """Recall at ``k``, averaged over the queries."""
    assert relevance_QC.any(axis=1).all(), "a query without a relevant candidate"
    relevant_Q = relevance_QC.sum(axis=1)
    size = similarity_QC.shape[1]
    return Recall(
        value=float(np.mean(_hits(k, similarity_QC, relevance_QC))),
        chance=float(np.mean([hit_probability(size - r, r, k) for r in relevant_Q.tolist()])),
        majority=_best_fixed_answer(k, relevance_QC),
        queries=similarity_QC.shape[0],
        candidates=size,
    )


def hit_probability(others: int, relevant: int, k: int) -> float:
    """Probability that a random order has a relevant item among its first ``k``.

    1 - C(n - r, k) / C(n, k): the order misses when all of the first k are others.
    """
    total = others + relevant
    k = min(max(k, 0), total)
    return 1.0 - math.comb(others, k) / math.comb(total, k)


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927): honest near 0 and 1, where the normal one is not."""
    scale = 1.0 + Z95**2 / count
    middle = (share + Z95**2 / (2 * count)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def effective_count(counts: Sequence[int]) -> float:
    """Samples behind an unweighted mean over strata: L^2 / sum of 1/n.

    The variance of the mean of L proportions p is p (1 - p) * sum(1/n) / L^2.
    """
    return len(counts) ** 2 / sum(1.0 / n for n in counts)


def _hits(k: int, similarity_QC: np.ndarray, relevance_QC: np.ndarray) -> list[float]:
    best_Q1 = np.where(relevance_QC, similarity_QC, -np.inf).max(axis=1, keepdims=True)
    higher_Q = (similarity_QC > best_Q1).sum(axis=1)
    tied_QC = similarity_QC == best_Q1
    tied_relevant_Q = (tied_QC & relevance_QC).sum(axis=1)
    tied_others_Q = (tied_QC & ~relevance_QC).sum(axis=1)
    rows = zip(higher_Q.tolist(), tied_others_Q.tolist(), tied_relevant_Q.tolist(), strict=True)
    return [hit_probability(others, relevant, k - higher) for higher, others, relevant in rows]


def _best_fixed_answer(k: int, relevance_QC: np.ndarray) -> float:
    """Recall of one list of k candidates given to every query, chosen greedily by coverage."""
    open_Q = np.ones(relevance_QC.shape[0], dtype=bool)
    for _ in range(min(k, relevance_QC.shape[1])):
        best = int(relevance_QC[open_Q].sum(axis=0).argmax())
        open_Q &= ~relevance_QC[:, best]
        if not open_Q.any():
            break
    return float(1.0 - open_Q.mean())


def _distinct(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """First row of each distinct name in order of appearance, and the index of every row's name."""
    index: dict[str, int] = {}
    index_of_row = np.array([index.setdefault(name, len(index)) for name in names], dtype=np.int64)
    return np.unique(index_of_row, return_index=True)[1], index_of_row


@dataclass(frozen=True)
class ZeroShot:
    """Both accuracies of a classifier, with their baselines."""

    accuracy: float
    balanced: float  # mean recall over the classes that occur
    chance: float  # of both
    majority: float  # of the plain accuracy; a constant answer's balanced accuracy is chance
    counts: tuple[int, ...]  # items of each class


def nearest_class(similarity_NC: np.ndarray, labels_N: np.ndarray) -> ZeroShot:
    """Accuracies of the nearest of C classes; a tie of t classes earns 1/t if the true one is among them."""
    best_NC = similarity_NC == similarity_NC.max(axis=1, keepdims=True)
    credit_N = best_NC[np.arange(len(labels_N)), labels_N] / best_NC.sum(axis=1)
    classes = similarity_NC.shape[1]
    counts_C = np.bincount(labels_N, minlength=classes)
    present = counts_C > 0
    recall_C = np.bincount(labels_N, weights=credit_N, minlength=classes)[present] / counts_C[present]
    return ZeroShot(
        accuracy=float(credit_N.mean()),
        balanced=float(recall_C.mean()),
        chance=1.0 / classes,
        majority=float(counts_C.max() / counts_C.sum()),
        counts=tuple(counts_C[present].tolist()),
    )
