"""Which experts a sample's tokens went to: the experts' concepts in words, and how alike samples that mean the same
are routed.

* Concepts: words of the samples' texts and classes that stand out among what an expert got, by log-odds with an
  informative prior (Monroe, Colaresi and Quinn 2008, "Fightin' Words", equations 16 to 22). A sample counts for an
  expert by the share of its tokens that the expert got.
* Consistency: the Jensen-Shannon divergence, in bits, of the experts' shares of two samples, 0 where they are equal,
  and how often both have the same most used expert: over pairs that mean the same, and over pairs that do not.

Shapes: S samples, E experts, W words, P pairs.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmmoe_pretrain.batch import Sample
from mmmoe_pretrain.data.pack import Origins
from mmmoe_pretrain.evaluate.features import content_name, same_text, text_of
from mmmoe_pretrain.evaluate.routing.top_tokens import Decisions
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.moe.tokens import TokenInfo

MOST = 4096  # samples that are looked at
MOST_NUMBERS = 1 << 26  # that are kept of them: fewer samples of a model with very many experts
MOST_VIEWS = 1024  # of them also changed
MOST_PAIRS = 4096
PRIOR = 100.0  # words that the prior weighs as much as
LEAST_Z, LEAST_SAMPLES = 1.96, 3.0  # of a word that is shown; samples that have it
LISTED = 8  # words of an expert and modality


@dataclass(frozen=True)
class Said:
    """What is said of a sample: the ``words`` of its ``text``, which is all its texts together, and of its class.
    ``shows``: equal for samples that show the same; their content beside the text, or else their group. ``written``:
    modalities of its texts."""

    words: frozenset[str]
    text: str
    shows: str
    written: frozenset[str]

    @classmethod
    def of(cls, sample: Sample) -> Said:
        text = text_of(sample)
        beside = next((content_name(item) for item in sample.items if not item.raw), "")
        return cls(
            frozenset(re.findall(r"\w+", f"{text} {sample.meta.label}".casefold())),
            same_text(text),
            beside or sample.meta.own_group,
            frozenset(item.modality for item in sample.items if item.raw),
        )


def most_samples(numbers: int) -> int:
    """To look at, of a model that gives ``numbers`` shares for each."""
    return max(64, min(MOST, MOST_NUMBERS // max(1, numbers)))


class SampleShares:
    """Collects batch by batch until there are ``most`` samples or more; ``said`` has what is said of them."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.said: list[Said] = []
        self._counts: defaultdict[tuple[int, str], list[np.ndarray]] = defaultdict(list)

    @property
    def full(self) -> bool:
        return len(self.said) >= self.most

    def add(
        self, decisions: Sequence[Decisions], tokens: TokenInfo, origins: Origins, samples: Sequence[Sample]
    ) -> None:
        if self.full:
            return
        modality_n = tokens.modality_ids_n.cpu().numpy()
        for layer in decisions:
            for m, name in enumerate(tokens.names.modalities):
                rows = np.flatnonzero((modality_n == m) & (origins.token_n >= 0))
                counts_SE = np.zeros((len(samples), layer.served_nE.shape[1]), dtype=np.float32)
                np.add.at(counts_SE, origins.sample_n[rows], layer.served_nE[rows])
                self._counts[layer.layer, name].append(counts_SE)
        self.said += map(Said.of, samples)

    def of(self, layer: int, modality: str) -> np.ndarray:
        """[S, E]: each expert's share of a sample's assignments; zeros of one without tokens."""
        counts_SE = np.concatenate(self._counts[layer, modality]).astype(np.float64)
        return counts_SE / np.maximum(counts_SE.sum(1, keepdims=True), 1.0)


def view_of(sample: Sample, modalities: Modalities, seed: int) -> Sample:
    """The sample with a view of each item in its place: a crop, or of texts some pieces; the same for each seed."""
    items = []
    for number, item in enumerate(sample.items):
        ways = modalities[item.modality].transforms
        way = ways.get("crop") or next(iter(ways.values()), None)
        rng = np.random.default_rng([seed, number])
        items.append(item if way is None else dataclasses.replace(item, value=way(item.value, rng)))
    return dataclasses.replace(sample, items=tuple(items))


def concepts(share_SE: np.ndarray, words_S: Sequence[Collection[str]]) -> list[list[tuple[str, float]]]:
    """By expert the words that stand out among its samples, each with its z-score, the highest first."""
    number: dict[str, int] = {}
    places = [(s, number.setdefault(word, len(number))) for s, words in enumerate(words_S) for word in sorted(words)]
    if not places:
        return [[] for _ in range(share_SE.shape[1])]
    of_sample, of_word = np.array(places).T
    counts_WE = np.zeros((len(number), share_SE.shape[1]))
    np.add.at(counts_WE, of_word, share_SE[of_sample])
    z_WE, names = log_odds(counts_WE), list(number)
    shown_WE = (z_WE >= LEAST_Z) & (counts_WE.sum(1, keepdims=True) >= LEAST_SAMPLES)
    order_WE = np.argsort(-z_WE, axis=0, kind="stable")
    return [
        [(names[w], float(z_WE[w, e])) for w in order_WE[:LISTED, e].tolist() if shown_WE[w, e]]
        for e in range(share_SE.shape[1])
    ]


def log_odds(counts_WE: np.ndarray) -> np.ndarray:
    """[W, E]: z-scores of the log-odds of a word with an expert against that with all others; the prior is the words'
    shares over all experts."""
    total_W1 = counts_WE.sum(1, keepdims=True)
    prior_W1 = PRIOR * total_W1 / max(total_W1.sum(), 1e-9)
    own_WE, other_WE = counts_WE + prior_W1, total_W1 - counts_WE + prior_W1
    with np.errstate(divide="ignore", invalid="ignore"):  # a single word, or one that no sample has
        odds_WE = [np.log(its / (its.sum(0) - its)) for its in (own_WE, other_WE)]
        z_WE = (odds_WE[0] - odds_WE[1]) / np.sqrt(1 / own_WE + 1 / other_WE)
    return np.where(np.isfinite(z_WE), z_WE, 0.0)


def paraphrases(said: Sequence[Said]) -> tuple[np.ndarray, np.ndarray]:
    """[P, 2], samples of different texts that show the same, each twice at most; and [P], what that is, a number."""
    alike: defaultdict[str, list[int]] = defaultdict(list)
    for s, its in enumerate(said):
        if its.text:
            alike[its.shows].append(s)
    found = [
        (a, b, number)
        for number, same in enumerate(alike.values())
        for a, b in itertools.pairwise(same)
        if said[a].text != said[b].text
    ]
    found_P3 = np.array(found[:MOST_PAIRS], dtype=np.int64).reshape(-1, 3)
    return found_P3[:, :2], found_P3[:, 2]


def consistency(first_PE: np.ndarray, second_PE: np.ndarray, other_PE: np.ndarray) -> dict[str, float] | None:
    """Of pairs ``first``, ``second`` that mean the same, and pairs ``first``, ``other`` that do not; None where there
    are fewer than two with tokens."""
    there = (first_PE.any(1)) & second_PE.any(1) & other_PE.any(1)
    if there.sum() < 2:
        return None
    first, second, other = first_PE[there], second_PE[there], other_PE[there]
    return {
        "pairs": int(there.sum()),
        "divergence": float(divergence(first, second).mean()),
        "divergence_unlike": float(divergence(first, other).mean()),
        "same_expert": float((first.argmax(1) == second.argmax(1)).mean()),
        "same_expert_unlike": float((first.argmax(1) == other.argmax(1)).mean()),
    }


def divergence(a_PE: np.ndarray, b_PE: np.ndarray) -> np.ndarray:
    """[P]: the Jensen-Shannon divergence of each pair of shares, in bits: from 0 to 1."""
    mean_PE = (a_PE + b_PE) / 2
    return _entropy(mean_PE) - (_entropy(a_PE) + _entropy(b_PE)) / 2


def _entropy(share_PE: np.ndarray) -> np.ndarray:
    return -(share_PE * np.log2(np.where(share_PE == 0, 1.0, share_PE))).sum(-1)


def summarise(own: SampleShares, views: SampleShares, layer: int, names: Sequence[str]) -> dict[str, Any]:
    """Of one layer, over ``names``, the modalities with tokens: ``concepts``, [expert] by modality, and
    ``consistency`` of ``views`` and ``paraphrases``, by modality. ``views``: of changed copies of the first samples
    of ``own``."""
    words_S = [its.words for its in own.said]
    listed = {name: concepts(own.of(layer, name), words_S) for name in names}
    found = {
        "views": {name: _of_views(own, views, layer, name) for name in names if views.said},
        "paraphrases": {name: _of_paraphrases(own, layer, name) for name in names},
    }
    return {
        "concepts": [
            {name: words for name, words in zip(names, of_expert, strict=True) if words}
            for of_expert in zip(*listed.values(), strict=True)
        ],
        "consistency": {what: {name: its for name, its in by.items() if its} for what, by in found.items()},
    }


def _of_views(own: SampleShares, views: SampleShares, layer: int, name: str) -> dict[str, float] | None:
    """Of a sample and its view; beside pairs of a sample and the view of one half of all samples further."""
    seen_SE = views.of(layer, name)
    return consistency(own.of(layer, name)[: len(seen_SE)], seen_SE, np.roll(seen_SE, len(seen_SE) // 2, axis=0))


def _of_paraphrases(own: SampleShares, layer: int, name: str) -> dict[str, float] | None:
    """Of texts alone, which are what differs; beside pairs of which the second is one half of all pairs further."""
    if not any(name in its.written for its in own.said):
        return None
    pairs_P2, shown_P = paraphrases(own.said)
    half = len(shown_P) // 2
    unlike_P = shown_P != np.roll(shown_P, half)
    share_SE = own.of(layer, name)
    first, second = pairs_P2[unlike_P].T
    return consistency(share_SE[first], share_SE[second], share_SE[np.roll(pairs_P2[:, 1], half)[unlike_P]])
