"""What samples hold, read once: sums by kind, sizes and lengths as histograms, what is wrong, and what is not read.

Of the samples some are chosen, the same ones for the same seed.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import xxhash

from mmmoe_pretrain.data.decode import BadSampleError
from mmmoe_pretrain.data_prep.decoding import decode
from mmmoe_pretrain.data_prep.inspect.histogram import Histogram
from mmmoe_pretrain.data_prep.inspect.records import Records, read_records
from mmmoe_pretrain.data_prep.rows.row import split_order
from mmmoe_pretrain.data_prep.samples import Piece, Sample, Shards, open_samples
from mmmoe_pretrain.data_prep.shards.audio import audio_seconds
from mmmoe_pretrain.limits import decoder_reason
from mmmoe_pretrain.modalities import default_modalities
from mmmoe_pretrain.modalities.image_file import IMAGE_ERRORS, header_size
from mmmoe_pretrain.progress import counted, track
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

    def add(self, other: Measure, sign: int = 1) -> None:
        self.rows += sign * other.rows
        self.seconds += sign * other.seconds
        self.bytes += sign * other.bytes

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
    decoded: int = 0  # of the chosen ones
    full_check: str = ""  # the command that decodes all

    @property
    def whole(self) -> Measure:
        return self.sum_of(self.totals)

    def by_split(self) -> Iterator[tuple[str, list[Kind]]]:
        for split in sorted({kind.split for kind in self.totals}, key=split_order):
            yield split, sorted(kind for kind in self.totals if kind.split == split)

    def sum_of(self, kinds: Iterable[Kind]) -> Measure:
        whole = Measure()
        for kind in kinds:
            whole.add(self.totals[kind])
        return whole

    def add(self, sample: Sample) -> tuple[Kind, Measure] | None:
        """Count it; where, unless it is damaged."""
        amount = Measure(1)
        problems = [sample.problem, *[self._add_piece(piece, amount) for piece in sample.pieces]]
        if problem := next(filter(None, problems), ""):
            self.add_damaged(sample, amount, problem)
            return None
        self.histograms["bytes"].add(amount.bytes)
        content = ("document of " if sample.is_document else "") + "+".join(sample.held)
        return self._count(sample, content, amount), amount

    def add_damaged(self, sample: Sample, amount: Measure, problem: str) -> None:
        self._count(sample, DAMAGED, amount)
        self.problem_count += 1
        if len(self.problems) < MOST_NAMED:
            is_named = unquote(sample.key) in ("", sample.where)
            self.problems.append(f"{sample.where}{'' if is_named else f' {sample.key}'}: {problem}")

    def _count(self, sample: Sample, content: str, amount: Measure) -> Kind:
        subset, language = (sample.fields.get(name) for name in ("subset", "language"))
        named = [name if isinstance(name, str) else "" for name in (subset, language)]
        kind = Kind(sample.split, named[0], named[1], content)
        if kind not in self.totals and len(self.totals) >= MOST_KINDS:
            kind = Kind(*[OTHERS] * 4)
        self.totals.setdefault(kind, Measure()).add(amount)
        return kind

    def _add_piece(self, piece: Piece, amount: Measure) -> str:
        """Count a file or text; what is wrong with it."""
        if piece.text is not None:
            self.histograms["characters"].add(len(piece.text))
            amount.bytes += len(piece.text.encode(errors="replace"))
        if piece.read is None:
            return ""
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
            return f"{piece.kind} {piece.name} cannot be opened: {decoder_reason(error)}"
        return ""

    def decode_chosen(self, counted_as: Iterable[tuple[Kind, Measure] | None]) -> None:
        """Decode the chosen samples as training does, and count the damaged ones as such."""
        pairs = zip(self.chosen, counted_as, strict=True)
        for sample, place in track(pairs, "decoding samples", len(self.chosen), "samples"):
            if place is not None and (problem := _undecodable(sample)):
                kind, amount = place
                self.totals[kind].add(amount, -1)
                self.add_damaged(sample, amount, problem)
        self.totals = {kind: total for kind, total in self.totals.items() if total.rows}
        self.decoded = len(self.chosen)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.name,
            "rows": self.whole.rows,
            "kinds": [{**kind._asdict(), **dataclasses.asdict(total)} for kind, total in sorted(self.totals.items())],
            "histograms": {name: each.to_json() for name, each in self.histograms.items() if each.count},
            "problems": {"count": self.problem_count, "first": self.problems},
            "decoded": self.decoded,
            "not_read": self.left_out,
            "records": None if self.records is None else self.records.to_json(),
        }


def measure(path: str | Path, samples: int = 0, seed: int = 0) -> Found:
    """Read everything once. ``samples``: how many are chosen, by a hash of their names and ``seed``."""
    data = open_samples(str(path))
    found, heap = Found(data.name), list[tuple[int, int, Sample, tuple[Kind, Measure] | None]]()
    for number, sample in enumerate(data):
        name = f"{sample.where}\0{sample.key}".encode(errors="replace")
        order = -xxhash.xxh3_64_intdigest(name, seed & (1 << 64) - 1)
        entry = (order, -number, sample, found.add(sample))
        if len(heap) < samples:
            heapq.heappush(heap, entry)
        elif heap and order > heap[0][0]:
            heapq.heapreplace(heap, entry)
    heap.sort(key=lambda entry: entry[:2], reverse=True)
    found.chosen = [sample for _, _, sample, _ in heap]
    found.decode_chosen(place for *_, place in heap)
    found.left_out = data.left_out()
    found.full_check = "verify --decode" if isinstance(data, Shards) else "shard"
    if isinstance(data, Shards):
        found.records = read_records([url for source in data.sources for url in source.urls], data.files)
    return found


def _undecodable(sample: Sample) -> str:
    """Why training could not decode it."""
    for piece in sample.pieces:
        if piece.read is not None:
            try:
                decode(piece.kind, piece.read(), default_modalities())
            except BadSampleError as error:
                return str(error)
    return ""


def amount(value: float) -> str:
    """``0.3125``, ``96``, ``12,345``."""
    return f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def lines(found: Found) -> Iterator[str]:
    """What else is to say, of the table and of the page."""
    if found.records is not None:
        yield found.records.line()
        for reason, count in found.records.reasons.most_common(MOST_NAMED):
            yield f"  {count:,} {reason}"
    if found.histograms["width"].count or found.histograms["seconds"].count:
        some = f", and {counted(found.decoded, 'sample')} decoded" * bool(found.decoded)
        yield f"headers of all images and audio were read{some}; mmmoe-data {found.full_check} decodes all"
    if found.problem_count:
        yield f"{counted(found.problem_count, 'damaged sample')}, which training would skip:"
        yield from (f"  {problem}" for problem in found.problems)
        if found.problem_count > len(found.problems):
            yield f"  and {found.problem_count - len(found.problems):,} more"
    if found.left_out:
        yield f"not read: {found.left_out}"
