"""``mmmoe-data words``: vectors of words from the texts of a split, by skip-gram with negative sampling (word2vec,
arXiv 1310.4546).

A word with the vector v predicts one near it in its text, which has the vector u. The loss of such a pair is
-log sigmoid(v u) - k E[log sigmoid(-v u_n)]: k negatives n are drawn by their counts to the power 0.75. The pairs of
a batch share its negatives, which leaves the expectation as it is and makes them one matrix product. Updates are
Adagrad's, with a rate that falls to 0. One thread, and distinct texts in the order of their hashes, make it
deterministic.

Shapes: V words, W numbers of a vector, B pairs of a batch, N negatives of a batch.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmmoe_pretrain.data_prep.console import answer
from mmmoe_pretrain.data_prep.rows.row import SPLITS
from mmmoe_pretrain.data_prep.rows.seen import values_wanted
from mmmoe_pretrain.data_prep.tokenizer import Texts, read_texts
from mmmoe_pretrain.modalities.word_vectors import words_of
from mmmoe_pretrain.paths import new_file
from mmmoe_pretrain.progress import counted, track

SMALLEST, LARGEST, STEPS = 64, 2048, 128  # pairs of a batch, and batches of a pass over few texts
NOISE = 256  # negatives that the pairs of a batch share
AT_ONCE = 1 << 20  # words of which the pairs are in memory and shuffled
RATE = 0.05
NOISE_POWER = 0.75
FEWEST = 2  # words that a file has, at least
MOST_TEXTS = 5_000_000
LONGEST = 64  # letters of a word; numpy keeps every word as long as the longest one
LARGEST_DIMENSION = 1 << 16  # as an objective can have


@dataclass(frozen=True, slots=True)
class WordOptions:
    """``sample``: a word of a larger share of all is left out at random, so that sqrt(sample / share) of it remain;
    0: none is. ``window``: each word reaches 1 to so many words, drawn evenly."""

    dimension: int = 64
    window: int = 5
    negatives: int = 5
    epochs: int = 10
    min_count: int = 2
    sample: float = 1e-3
    seed: int = 1

    def __post_init__(self) -> None:
        for name in ("dimension", "window", "negatives", "epochs", "min_count"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if self.dimension > LARGEST_DIMENSION:
            raise ValueError(f"--dimension {self.dimension} is above {LARGEST_DIMENSION}")
        if self.sample < 0 or self.seed < 0:
            raise ValueError(f"--sample {self.sample:g} and --seed {self.seed} must not be negative")


@dataclass(frozen=True)
class Corpus:
    """The words with their counts, the most frequent first; the known words of all texts as numbers of these, one
    text after the other, and of each the number of its text."""

    words: list[str]
    counts: np.ndarray
    ids: np.ndarray
    texts: np.ndarray


def run(
    paths: Sequence[str],
    out: Path,
    split: str,
    filters: Sequence[str],
    options: WordOptions,
    overwrite: bool = False,
    as_json: bool = False,
) -> None:
    """The command: read the texts of all paths, train, write, and print a summary."""
    if split not in SPLITS:
        raise ValueError(f"--split {split!r} is not one of {', '.join(SPLITS)}")
    if out.suffix != ".npz" or out.is_dir():
        raise ValueError(f"--out {out} is not the name of a file that ends with .npz")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists; choose another --out, or pass --overwrite to replace it")
    with tempfile.TemporaryFile() as file:
        texts = Texts(file, MOST_TEXTS)
        skipped = read_texts(paths, split, texts, values_wanted(filters))
        count = texts.close()
        corpus = corpus_of(texts, options.min_count)
    if len(corpus.words) < FEWEST:
        raise ValueError(
            f"{counted(count, 'text')} of split {split} have {counted(len(corpus.words), 'word')} that come "
            f"--min-count {options.min_count} times; lower it, or check --split, --filter and the paths"
        )
    vectors = train(corpus, options)
    made = {**dataclasses.asdict(options), "split": split, "filter": list(filters), "texts": count}
    save(out, corpus, vectors, made)
    facts = {"out": str(out), "words": len(corpus.words), "dimension": options.dimension, "texts": count,
             "running_words": len(corpus.ids), "skipped_samples": skipped}  # fmt: skip
    lines = [f"{out}: {counted(len(corpus.words), 'vector')} of {options.dimension} numbers from "
             f"{counted(count, 'text')} of {split}"]  # fmt: skip
    if skipped:
        lines.append(f"skipped {counted(skipped, 'sample')} that cannot be used; `mmmoe-data inspect` counts them")
    answer(as_json, facts, *lines)


def save(out: Path, corpus: Corpus, vectors: np.ndarray, made: dict[str, object]) -> None:
    """Write the words, their vectors and counts, and how they were made."""
    with new_file(out) as draft, draft.open("wb") as file:
        np.savez(file, words=np.asarray(corpus.words), vectors=vectors, counts=corpus.counts,
                 made=np.asarray(json.dumps(made)))  # fmt: skip


def corpus_of(texts: Iterable[str], min_count: int) -> Corpus:
    """``texts``, which can be read twice, with the words of at most LONGEST letters that come ``min_count`` times."""
    times = Counter(word for text in texts for word in words_of(text) if len(word) <= LONGEST)
    words = sorted((word for word, n in times.items() if n >= min_count), key=lambda word: (-times[word], word))
    numbers = {word: number for number, word in enumerate(words)}
    found = [np.asarray([numbers[w] for w in words_of(text) if w in numbers], dtype=np.int32) for text in texts]
    ids = np.concatenate([np.zeros(0, dtype=np.int32), *found])
    counts = np.asarray([times[word] for word in words], dtype=np.int64)
    return Corpus(words, counts, ids, np.repeat(np.arange(len(found), dtype=np.int32), [len(one) for one in found]))


def train(corpus: Corpus, options: WordOptions) -> np.ndarray:
    """The vectors [V, W] of the words as they predict others."""
    return train_both(corpus, options)[0]


def train_both(corpus: Corpus, options: WordOptions) -> tuple[np.ndarray, np.ndarray]:
    """[V, W]: of the words as they predict, and as they are predicted."""
    rng, size = np.random.default_rng(options.seed), (len(corpus.words), options.dimension)
    start = (rng.random(size, dtype=np.float32) - 0.5) / options.dimension
    centres, contexts = _Table(start), _Table(np.zeros(size, dtype=np.float32))
    noise_V = np.cumsum(corpus.counts**NOISE_POWER)
    passes = [(epoch, at) for epoch in range(options.epochs) for at in range(0, len(corpus.ids), AT_ONCE)]
    for number, (_, at) in enumerate(track(passes, "training word vectors", len(passes), "passes")):
        pairs = pairs_of(corpus, slice(at, at + AT_ONCE), options, rng)
        batch = min(max(pairs.shape[1] // STEPS, SMALLEST), LARGEST)
        for first in range(0, pairs.shape[1], batch):
            centre_B, context_B = pairs[:, first : first + batch]
            negative_N = np.searchsorted(noise_V, rng.random(NOISE) * noise_V[-1], side="right")
            _, slopes = loss_and_slopes(
                centres.rows[centre_B], contexts.rows[context_B], contexts.rows[negative_N], options.negatives
            )
            rate = RATE * (1 - (number + first / pairs.shape[1]) / len(passes))
            centres.step(centre_B, slopes[0], rate)
            contexts.step(np.concatenate([context_B, negative_N]), np.concatenate(slopes[1:]), rate)
    return centres.rows, contexts.rows


def pairs_of(corpus: Corpus, part: slice, options: WordOptions, rng: np.random.Generator) -> np.ndarray:
    """int32 [2, n]: words and those near them in the same text, in random order."""
    ids, texts = corpus.ids[part], corpus.texts[part]
    if options.sample:
        share_V = corpus.counts / corpus.counts.sum()
        kept = rng.random(len(ids)) < np.sqrt(options.sample / share_V)[ids]
        ids, texts = ids[kept], texts[kept]
    reach = rng.integers(1, options.window + 1, len(ids))
    found = [np.zeros((2, 0), dtype=np.int32)]
    for apart in range(1, min(options.window, len(ids) - 1) + 1):
        before, after, same = ids[:-apart], ids[apart:], texts[:-apart] == texts[apart:]
        for centre, context, reaches in (
            (before, after, reach[:-apart] >= apart),
            (after, before, reach[apart:] >= apart),
        ):
            found.append(np.stack([centre, context])[:, same & reaches])
    pairs = np.concatenate(found, axis=1)
    return pairs[:, rng.permutation(pairs.shape[1])]


def loss_and_slopes(
    centre_BW: np.ndarray, context_BW: np.ndarray, negative_NW: np.ndarray, negatives: int
) -> tuple[float, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The sum of the pairs' losses, each with the mean over the N times ``negatives``, and its gradients."""
    weight = negatives / len(negative_NW)
    true_B = (centre_BW * context_BW).sum(axis=1)
    false_BN = centre_BW @ negative_NW.T
    loss = np.logaddexp(0, -true_B).sum() + weight * np.logaddexp(0, false_BN).sum()
    of_true_B1 = _sigmoid(true_B)[:, None] - 1
    of_false_BN = weight * _sigmoid(false_BN)
    slopes = (
        of_true_B1 * context_BW + of_false_BN @ negative_NW,
        of_true_B1 * centre_BW,
        of_false_BN.T @ centre_BW,
    )
    return float(loss), slopes


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


class _Table:
    """Vectors [V, W] under Adagrad."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self._squares = rows, np.zeros_like(rows)

    def step(self, ids: np.ndarray, slopes: np.ndarray, rate: float) -> None:
        """``ids`` may come several times: their gradients are added up."""
        order = np.argsort(ids, kind="stable")
        sorted_ids = ids[order]
        starts = np.flatnonzero(np.diff(sorted_ids, prepend=-1))
        touched, sums = sorted_ids[starts], np.add.reduceat(slopes[order], starts)
        self._squares[touched] += sums**2
        self.rows[touched] -= np.float32(rate) * sums / (np.sqrt(self._squares[touched]) + 1e-8)
