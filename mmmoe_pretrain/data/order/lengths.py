"""How many tokens a sample of an indexed source will take in the stream, without reading it.

By the file of its exact lengths where ``mmmoe-data index CONFIG --lengths`` has measured them; else by the sizes of
its files, with lines fitted to a few samples of the source. How often the objectives repeat each modality is counted
on the same samples; where they draw (``fraction``, alternatives), ``DrawnRows`` asks them for a position's draws, as
it does for the modalities that a sample loses there.

One rank estimates, and all use its numbers (``Estimate``): decoders and linear algebra may differ in the last bit
between processors, and ranks that disagreed would lose samples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import Draws, decode, labels_drawn, modalities_kept
from mmmoe_pretrain.data.pack import PackSettings, origins
from mmmoe_pretrain.data.sources.source import Indexed
from mmmoe_pretrain.modalities import Modalities, Modality
from mmmoe_pretrain.modalities.transforms import Transform
from mmmoe_pretrain.progress import Progress

PROBED = 32  # samples of each kind that are read for an estimate
MOST_KINDS = 16
MEAN_OF = 4096  # samples that a mean is taken over
CHECKED = 4096  # entries of a file of lengths that its digest covers


@dataclass(frozen=True)
class Line:
    """Tokens of a file by its bytes: ``offset + slope * bytes``, from ``low`` to ``high``."""

    offset: float
    slope: float
    low: float
    high: float

    def at(self, size: np.ndarray) -> np.ndarray:
        return np.clip(self.offset + self.slope * size, self.low, self.high)


@dataclass(frozen=True)
class Fit:
    """Of samples with files for the same modalities, by modality: a line, and how often the stream repeats it.
    ``document``, ``label_tokens``: they are documents; they have a class, whose text has so many tokens (else 0).
    ``drawn``: what the stream has of a sample depends on random choices at its position."""

    lines: tuple[Line, ...]
    repeats: tuple[float, ...]
    document: bool = False
    label_tokens: int = 0
    drawn: bool = False


@dataclass(frozen=True)
class Estimate:
    """Of one source, by pattern: a bit for each modality that a sample has a file for. ``measured``: digest of the
    file of exact lengths; empty without one."""

    fits: dict[int, Fit]
    measured: str = ""


class Lengths:
    """What the samples of one source will take in the stream, by rank 0's ``estimate``."""

    def __init__(self, source: Indexed, estimate: Estimate, name: str) -> None:
        """Raises ValueError with the source's ``name`` where the lengths that rank 0 has used are not found here."""
        self._source, self._estimate, self._exact = source, estimate, None
        if estimate.measured:
            path = lengths_path(source, source.modalities)
            self._exact = open_lengths(path, source, source.modalities)
            if self._exact is None or digest(self._exact) != estimate.measured:
                raise ValueError(
                    f"rank 0 has lengths of the samples of {name} that this rank does not find at {path}; put them "
                    f"where all machines read them, remove them, or set data.level_tokens: false"
                )

    def by_modality(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float64 [n, M]: the tokens that each sample is expected to have; int64 [n]: their patterns."""
        sizes = [self._source.sizes_of(indices, name) for name in self._source.modalities]
        pattern = sum(((size > 0).astype(np.int64) << m for m, size in enumerate(sizes)), np.zeros(len(indices), int))
        if self._exact is not None:
            return self._exact[indices].astype(np.float64), pattern
        tokens = np.zeros((len(indices), len(sizes)))
        for key in np.unique(pattern).tolist():
            here = np.flatnonzero(pattern == key)
            for m, line in enumerate(self.fit(key).lines):
                tokens[here, m] = line.at(sizes[m][here])
        return tokens, pattern

    def key(self, index: int) -> str:
        """Of a sample."""
        return self._source.key(index)

    def fit(self, pattern: int) -> Fit:
        """Of a pattern; where none of its samples could be read, of no tokens, which the stream has once."""
        count = len(self._source.modalities)
        return self._estimate.fits.get(pattern) or Fit((Line(0.0, 0.0, 0.0, 0.0),) * count, (1.0,) * count)

    @property
    def drawn(self) -> bool:
        """Whether the rows of some sample depend on random choices at its position."""
        return any(its.drawn for its in self._estimate.fits.values())

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n]: the rows that each sample is expected to take in the stream, on average over random choices."""
        tokens, pattern = self.by_modality(indices)
        total = np.zeros(len(indices))
        for key in np.unique(pattern).tolist():
            here = np.flatnonzero(pattern == key)
            for m, repeat in enumerate(self.fit(key).repeats):
                total[here] += repeat * tokens[here, m]
        return np.rint(total).astype(np.int64)

    def mean(self, indices: np.ndarray | None = None) -> float:
        """The mean rows of the samples ``indices`` (None: all), over at most MEAN_OF of them."""
        count = len(self._source) if indices is None else len(indices)
        some = np.arange(min(count, MEAN_OF)) * count // min(count, MEAN_OF)
        found = self.rows(some if indices is None else indices[some].astype(np.int64))
        return int(found.sum()) / len(some)


class _Counted:
    """A modality whose values are lengths, int64 [1]."""

    def __init__(self, modality: Modality) -> None:
        self._modality = modality

    def __getattr__(self, name: str) -> Any:
        return getattr(self._modality, name)

    def num_tokens(self, value: np.ndarray) -> int:
        return int(value[0])

    def keys(self, value: np.ndarray) -> np.ndarray:
        return np.zeros(int(value[0]), dtype=np.int64)

    @property
    def transforms(self) -> dict[str, Transform]:
        """Some change the length, which is not known here."""
        return dict.fromkeys(self._modality.transforms, lambda value, rng: value)

    def may_hide(self, value: np.ndarray) -> np.ndarray:
        return np.arange(int(value[0]))

    def hide(self, value: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        return value

    def contents(self, value: np.ndarray) -> np.ndarray:
        return np.zeros((int(value[0]), self._modality.content_size), dtype=np.float32)


class DrawnRows:
    """The rows of the stream with the random choices at each position: the objectives are asked for the segments of
    samples that have lengths in place of contents."""

    def __init__(self, config: RunConfig, modalities: Modalities) -> None:
        counted = {name: cast(Modality, _Counted(modality)) for name, modality in modalities.items()}
        self._settings = PackSettings.from_config(config, Modalities(counted))
        self._modalities, self._loses = modalities, _loses(modalities)
        self._seed, self._batch = config.seed, config.train.global_batch_size

    def of(self, lengths: Lengths, indices: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the rows of the samples ``indices`` of a source at global ``positions``."""
        tokens, patterns = lengths.by_modality(indices)
        counts = np.rint(tokens).astype(np.int64)
        samples = []
        each = zip(counts, patterns.tolist(), positions.tolist(), indices.tolist(), strict=True)
        for row, pattern, position, index in each:
            fit = lengths.fit(pattern)
            if fit.label_tokens:
                row = self._with_label(row, fit.label_tokens, position)
            if self._loses and not fit.document:
                row = self._kept(row, lengths.key(index), position)
            items = (Item(name, row[m : m + 1]) for m, name in enumerate(self._modalities) if row[m])
            samples.append(Sample(SampleMeta(""), tuple(items), document=fit.document))
        return np.bincount(origins(samples, self._settings, positions).sample_n, minlength=len(samples))

    def _with_label(self, row: np.ndarray, tokens: int, position: int) -> np.ndarray:
        """The lengths of a sample that may have its class as a text, as ``decode`` draws it."""
        names = list(self._modalities)
        held = {names[m] for m in np.flatnonzero(row)}
        for name, kept in labels_drawn(held, self._modalities, partial(self._settings.generator, position)):
            row = np.asarray([tokens if m == name else row[k] if m in kept else 0 for k, m in enumerate(names)])
        return row

    def _kept(self, row: np.ndarray, key: str, position: int) -> np.ndarray:
        """The lengths without the modalities that the sample loses there."""
        held = tuple(name for m, name in enumerate(self._modalities) if row[m])
        draws = Draws(self._seed, position, position // self._batch)
        kept = modalities_kept(key, held, self._modalities, draws)
        return np.asarray([count if name in kept else 0 for name, count in zip(self._modalities, row, strict=True)])


def _loses(modalities: Modalities) -> bool:
    return any(its.settings.may_be_lost for its in modalities.values())


def estimate(source: Indexed, settings: PackSettings, prompt: str, most: int | None) -> Estimate:
    """An estimate from at most PROBED samples of each kind. ``most``: tokens of a document."""
    modalities = settings.modalities
    samples: list[Sample] = []
    patterns, sizes = [], []
    for i in _probed(source):
        sample = decode(source.read(i), modalities, None, prompt, most)
        if isinstance(sample, Sample):
            size = [int(source.sizes_of(np.asarray([i]), name)[0]) for name in modalities]
            samples.append(sample)
            sizes.append(size)
            patterns.append(sum(1 << m for m, its in enumerate(size) if its))
    tokens = [_tokens(sample, modalities) for sample in samples]
    packed = _packed(samples, settings, np.arange(len(samples)))
    again = _packed(samples, settings, np.arange(len(samples)) + len(samples))
    fits = {}
    for pattern in sorted(set(patterns)):
        mine = [n for n, its in enumerate(patterns) if its == pattern]
        both = [([sizes[n][m] for n in mine], [tokens[n][m] for n in mine]) for m in range(len(modalities))]
        labels = [_label_tokens(samples[n], modalities, prompt) for n in mine]
        fits[pattern] = Fit(
            tuple(fit(*pairs, its.max_tokens) for its, pairs in zip(modalities.values(), both, strict=True)),
            tuple(int((packed + again)[mine, m].sum()) / max(1, 2 * sum(its)) for m, (_, its) in enumerate(both)),
            document=2 * sum(samples[n].document for n in mine) > len(mine),
            label_tokens=sum(labels) // len(labels) if all(labels) else 0,
            drawn=any(labels) or _loses(modalities) or bool((packed != again)[mine].any()),
        )
    exact = open_lengths(lengths_path(source, modalities), source, modalities)
    return Estimate(fits, "" if exact is None else digest(exact))


def _label_tokens(sample: Sample, modalities: Modalities, prompt: str) -> int:
    """Tokens of the sample's class as a text; 0 where it has none, or none is used as a text."""
    reader = next((its for its in modalities.values() if its.label_probability), None)
    if reader is None or not sample.meta.label or sample.document:
        return 0
    value = reader.decode(prompt.format(sample.meta.label).encode())
    return 0 if value is None else reader.num_tokens(value)


def fit(sizes: Sequence[int], tokens: Sequence[int], most: int) -> Line:
    """The least-squares line through the points; flat where it would not rise. Exact up to one rounding."""
    n, x, y = len(sizes), sum(sizes), sum(tokens)
    spread = n * sum(size * size for size in sizes) - x * x
    slope = Fraction(n * sum(s * t for s, t in zip(sizes, tokens, strict=True)) - x * y, spread) if spread else 0
    if slope <= 0 or min(tokens) == max(tokens):
        return Line(y / n, 0.0, 0.0, float("inf"))
    return Line(float((y - slope * x) / n), float(slope), float(min(1, *tokens)), float(max(most, *tokens)))


def measure_lengths(source: Indexed, modalities: Modalities, path: Path) -> None:
    """Decode every sample of ``source``, and write its tokens by modality to ``path``: uint32 [N, M], NumPy's format.
    A bad sample has none. Processes that read the old file meanwhile keep it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part.npy")
    found = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint32, shape=(len(source), len(modalities)))
    try:
        with Progress("measuring lengths", len(source), "samples") as progress:
            for i in range(len(source)):
                sample = decode(source.read(i), modalities)
                if isinstance(sample, Sample):
                    found[i] = _tokens(sample, modalities)
                progress.advance()
        found.flush()
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def open_lengths(path: Path, source: Indexed, modalities: Modalities) -> np.ndarray | None:
    """The memory-mapped lengths at ``path``; None where there are none of a source of this size."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = found.dtype == np.uint32 and found.shape == (len(source), len(modalities))
    return found if whole else None


def lengths_path(source: Indexed, modalities: Modalities) -> Path:
    """Where the lengths of ``source`` are: beside its index. The name has a fingerprint of the tokenizer and of the
    modalities' settings."""
    settings = {name: modality.settings.of_the_model() for name, modality in modalities.items()}
    mark = xxhash.xxh3_64_hexdigest(json.dumps([settings, modalities.fingerprint], sort_keys=True).encode())
    return source.index_path.with_name(f"{source.index_path.name}-{mark}.lengths.npy")


def digest(exact: np.ndarray) -> str:
    """Of a file of lengths: of its shape and of CHECKED rows evenly spread over it."""
    some = np.arange(min(len(exact), CHECKED)) * len(exact) // max(1, min(len(exact), CHECKED))
    return xxhash.xxh3_64_hexdigest(f"{exact.shape}".encode() + np.ascontiguousarray(exact[some]).tobytes())


def _probed(source: Indexed) -> Iterator[int]:
    kinds = sorted(source.contents.items(), key=lambda item: (-item[1], item[0]))
    for extensions, _ in kinds[:MOST_KINDS]:
        yield from source.with_contents(extensions, PROBED).tolist()


def _tokens(sample: Sample, modalities: Modalities) -> list[int]:
    """Of all items, by modality."""
    found = dict.fromkeys(modalities, 0)
    for item in sample.items:
        found[item.modality] += modalities[item.modality].num_tokens(item.value)
    return list(found.values())


def _packed(samples: Sequence[Sample], settings: PackSettings, positions: np.ndarray) -> np.ndarray:
    """int64 [n, M]: rows of each sample in the stream by modality."""
    names = list(settings.modalities)
    found = np.zeros((len(samples), len(names)), dtype=np.int64)
    where = origins(samples, settings, positions)
    for b, sample in enumerate(samples):
        counts = np.bincount(where.item_n[where.sample_n == b], minlength=len(sample.items))
        for item, count in zip(sample.items, counts.tolist(), strict=True):
            found[b, names.index(item.modality)] += count
    return found
