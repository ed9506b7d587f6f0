"""What samples hold, read once: sums by kind, sizes and lengths as histograms, what is wrong, and what is not read.

Of the samples some are chosen, the same ones for the same seed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data_prep.inspect.histogram import Histogram
from data_prep.inspect.records import Records, read_records
from data_prep.rows.row import split_order
from data_prep.samples import Piece, Sample, Shards, open_samples
from data_prep.shards.audio import audio_seconds
from mmmoe_pretrain.limits import decoder_reason
from mmmoe_pretrain.modalities.image_file import IMAGE_ERRORS, header_size
from mmmoe_pretrain.progress import counted
from mmmoe_pretrain.urls import StorageError

DAMAGED = "(damaged)"  # in the place of modalities: a sample that training skips
OTHERS = "(others)"
MOST_KINDS = 1000  # lines of the table; further ones are counted as OTHERS
MOST_NAMED = 10  # problems
QUANTITIES = {"width": "pixels", "height": "pixels", "seconds": "s", "characters": "", "bytes": ""}


class Kind(NamedTuple):
    """The key of a line of the table."""

    split: str
    subset: str
    language: str
    modalities: str


@dataclass(slots=True)
class Measure:
    """Sums over the rows of a kind."""

    rows: int = 0
    seconds: float = 0.0  # of audio
    bytes: int = 0

    def __iadd__(self, other: Measure) -> Measure:
        self.rows += other.rows
        self.seconds += other.seconds
        self.bytes += other.bytes
        return self

    def cells(self) -> tuple[str, str, str]:
        """Of the table: rows, hours of audio, bytes."""
        return f"{self.rows:,}", f"{self.seconds / 3600:.3f}" if self.seconds else "", f"{self.bytes:,}"


@dataclass(slots=True)
class Found:
    """What the samples hold. ``chosen``: those that are shown."""

    name: str
    totals: dict[Kind, Measure] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram() for name in QUANTITIES})
    problems: list[str] = field(default_factory=list)  # the first ones
    problem_count: int = 0
    left_out: str = ""
    records: Records | None = None
    chosen: list[Sample] = field(default_factory=list)

    @property
    def whole(self) -> Measure:
        return _sum(self.totals.values())

    def by_split(self) -> Iterator[tuple[str, list[Kind]]]:
        for split in sorted({kind.split for kind in self.totals}, key=split_order):
            yield split, sorted(kind for kind in self.totals if kind.split == split)

    def sum_of(self, kinds: Iterable[Kind]) -> Measure:
        return _sum(self.totals[kind] for kind in kinds)

    def add(self, sample: Sample) -> None:
        amount = Measure(1)
        for piece in sample.pieces:
            self._add_piece(piece, sample, amount)
        content = ("document of " if sample.is_document else "") + "+".join(sample.held)
        if sample.problem:
            content = DAMAGED
            self._problem(sample, sample.problem)
        else:
            self.histograms["bytes"].add(amount.bytes)
        subset, language = (sample.fields.get(name) for name in ("subset", "language"))
        named = [name if isinstance(name, str) else "" for name in (subset, language)]
        kind = Kind(sample.split, named[0], named[1], content)
        if kind not in self.totals and len(self.totals) >= MOST_KINDS:
            kind = Kind(*[OTHERS] * 4)
        total = self.totals.setdefault(kind, Measure())
        total += amount

    def _add_piece(self, piece: Piece, sample: Sample, amount: Measure) -> None:
        if piece.text is not None:
            self.histograms["characters"].add(len(piece.text))
            amount.bytes += len(piece.text.encode(errors="replace"))
        if piece.read is None:
            return
        try:
            data = piece.read()
            amount.bytes += len(data)
            if piece.kind == "image":
                for name, pixels in zip(("width", "height"), header_size(data), strict=True):
                    self.histograms[name].add(pixels)
            elif piece.kind == "audio":
                seconds = audio_seconds(data)
                self.histograms["seconds"].add(seconds)
                amount.seconds += seconds
        except StorageError:  # of shards: a disk or a server, and no fault of the sample
            raise
        except IMAGE_ERRORS as error:
            self._problem(sample, f"{piece.kind} {piece.name} cannot be opened: {decoder_reason(error)}")

    def _problem(self, sample: Sample, problem: str) -> None:
        self.problem_count += 1
        if len(self.problems) < MOST_NAMED:
            self.problems.append(f"{sample.where} {sample.key}: {problem}")

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.name,
            "rows": self.whole.rows,
            "kinds": [
                {**kind._asdict(), "rows": m.rows, "seconds": m.seconds, "bytes": m.bytes}
                for kind, m in sorted(self.totals.items())
            ],
            "histograms": {name: each.to_json() for name, each in self.histograms.items() if each.count},
            "problems": {"count": self.problem_count, "first": self.problems},
            "not_read": self.left_out,
            "records": None if self.records is None else self.records.to_json(),
        }


def measure(path: str | Path, samples: int = 0, seed: int = 0) -> Found:
    """Read everything once. ``samples``: how many are chosen, by a hash of their names and ``seed``."""
    data = open_samples(str(path))
    found, heap = Found(data.name), list[tuple[int, int, Sample]]()
    for number, sample in enumerate(data):
        found.add(sample)
        name = f"{sample.where}\0{sample.key}".encode(errors="replace")
        order = -xxhash.xxh3_64_intdigest(name, seed & (1 << 64) - 1)
        if len(heap) < samples:
            heapq.heappush(heap, (order, -number, sample))
        elif heap and order > heap[0][0]:
            heapq.heapreplace(heap, (order, -number, sample))
    found.chosen = [sample for *_, sample in sorted(heap, key=lambda each: each[:2], reverse=True)]
    found.left_out = data.left_out()
    if isinstance(data, Shards):
        found.records = read_records([url for source in data.sources for url in source.urls], data.files)
    return found


def _sum(measures: Iterable[Measure]) -> Measure:
    whole = Measure()
    for each in measures:
        whole += each
    return whole


def amount(value: float) -> str:
    """``0.3125``, ``96``, ``12,345``."""
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def lines(found: Found) -> Iterator[str]:
    """What else is to say, of the table and of the page."""
    if found.records is not None:
        yield found.records.line()
        for reason, count in found.records.reasons.most_common(MOST_NAMED):
            yield f"  {count:,} {reason}"
    if found.problem_count:
        yield f"{counted(found.problem_count, 'problem')}, of which training skips the sample:"
        yield from (f"  {problem}" for problem in found.problems)
        if found.problem_count > len(found.problems):
            yield f"  and {found.problem_count - len(found.problems):,} more"
    if found.left_out:
        yield f"not read: {found.left_out}"
