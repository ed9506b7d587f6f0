"""``mmmoe-data shard``: a manifest becomes shards, one folder a split.

Rows are ordered by a hash of their keys, so every shard is a mix, and the same input gives the same bytes with any
number of workers and after any number of interrupted runs (``building.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import logging
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console
from rich.table import Table

from data_prep.building import Building, Finished
from data_prep.card import NAME as CARD
from data_prep.card import field_types, write_card
from data_prep.documents import PARTS, parts_of
from data_prep.manifest import (
    SPLITS,
    Row,
    files_outside,
    filter_rows,
    is_inside,
    manifest_path,
    read_manifest,
    row_fields,
    sample_fields,
)
from data_prep.media import DECODED, member
from data_prep.pool import map_in_order
from data_prep.shard_files import BadSample, EncodedSample, write_shard, write_shard_list
from mmmoe_pretrain import __version__
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.limits import MAX_META_BYTES
from mmmoe_pretrain.modalities import format_of
from mmmoe_pretrain.progress import Progress, counted

log = logging.getLogger(__name__)
MOST_NAMED = 20  # samples in one message
SKIPPED = "skipped.jsonl"
_ROWS_A_TASK = 32


@dataclass(frozen=True, slots=True)
class ShardOptions:
    samples_per_shard: int = 1000
    image_size: int | None = None  # pixels of the longest side
    audio_rate: int | None = None  # Hz
    workers: int = 2
    max_bad_fraction: float = 0.01
    overwrite: bool = False


@dataclass(slots=True)
class Report:
    """What was written, by split, and what was skipped, of ``total`` rows."""

    total: int
    max_bad_fraction: float
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: list[BadSample] = field(default_factory=list)
    blank_texts: int = 0  # of samples that have an image or audio
    kept: int = 0  # shards that an earlier run had finished
    members: set[str] = field(default_factory=set)  # the suffixes in any sample

    def add(self, line: Finished) -> None:
        self.skipped += line.skipped
        self.blank_texts += line.blank_texts
        self.members.update(line.members)

    def check(self, skipped: Sequence[BadSample]) -> None:
        """Raise ValueError if these are too many."""
        allowed = int(self.max_bad_fraction * self.total)
        if len(skipped) > allowed:
            raise ValueError(
                f"{len(skipped)} of {counted(self.total, 'sample')} cannot be used, and --max-bad-fraction "
                f"{self.max_bad_fraction:g} allows {allowed}; fix them, or raise it: {_worst(skipped)}"
            )


def run(manifest: Path, out: Path, filters: Sequence[str], options: ShardOptions) -> None:
    """The command: read, filter, write, index, and print a summary."""
    path = manifest_path(manifest)
    report = shard_manifest(filter_rows(read_manifest(path), filters), path.parent, out, options)
    table = Table("split", "shards", "samples", "bytes")
    for split, entries in report.shards.items():
        samples, size = (sum(entry[name] for entry in entries) for name in ("nsamples", "filesize"))
        open_indexed(out / split)
        table.add_row(split, f"{len(entries):,}", f"{samples:,}", f"{size:,}")
    console = Console(highlight=False, markup=False)
    console.print(table)
    if report.kept:
        console.print(f"kept {counted(report.kept, 'shard')} that an earlier run had finished")
    if report.skipped:
        console.print(f"skipped {counted(len(report.skipped), 'broken sample')}, named in {out / SKIPPED}")
    if report.blank_texts:
        console.print(f"skipped {counted(report.blank_texts, 'blank text')} of samples with an image or audio")


def shard_manifest(rows: Sequence[Row], root: Path, out: Path, options: ShardOptions) -> Report:
    """Write ``rows``, whose paths are relative to ``root``, as shards under ``out``."""
    if not rows:
        raise ValueError("no rows to write; loosen --filter")
    if outside := files_outside(rows, root):
        log.warning(
            "%s outside of %s, the manifest's folder, such as %s", counted(len(outside), "file"), root, outside[0]
        )
    for (name, kind), count in _unread_files(rows).items():
        log.warning("field %s names files in %s and is ignored; rename it to %s", name, counted(count, "row"), kind)
    report = Report(len(rows), options.max_bad_fraction)
    with Building(out, options.overwrite) as building, Progress("sharding", len(rows), "samples") as progress:
        for split in SPLITS:
            ordered = sorted((row for row in rows if row.split == split), key=_order)
            if ordered:
                work = _Split(split, ordered, root, options, report, progress)
                if entries := work.write(building):
                    report.shards[split] = entries
        if not report.shards:
            raise ValueError(f"every sample is broken: {_worst(report.skipped)}")
        report.check(report.skipped)
        _write_skipped(building.folder / SKIPPED, report.skipped)
        columns = report.members, field_types(rows)
        for split in report.shards:
            write_card(building.folder / split, {split: "*.tar"}, *columns)
        write_card(building.folder, {split: f"{split}/*.tar" for split in report.shards}, *columns)
        building.commit(SKIPPED, CARD)
    return report


@dataclass(slots=True)
class _Split:
    """The rows of one split, of which those before ``end`` are done."""

    name: str
    rows: Sequence[Row]
    root: Path
    options: ShardOptions
    report: Report  # of all splits
    progress: Progress
    end: int = 0
    pending: Finished = field(init=False)  # the shard that is being written

    def __post_init__(self) -> None:
        self.pending = Finished(self.name)

    def write(self, building: Building) -> list[dict[str, Any]]:
        """The entries of ``shards.json``, which is not written where there are none; shards that an earlier run has
        finished are kept."""
        per_shard, folder = self.options.samples_per_shard, building.folder / self.name
        kept = building.begin(self.name, len(self.rows), per_shard, self.inputs)
        for line in kept:
            self.report.add(line)
            self.end = line.end
        self.report.kept += len(kept)
        self._check(self.report.skipped)
        if kept:
            self.progress.restart(self.progress.done + self.end, self.progress.total)
        entries, start = [line.entry for line in kept], self.end
        with contextlib.closing(self._samples()) as samples:
            for first in samples:  # taking the first one ahead means that no shard is empty
                path = folder / f"{len(entries):05d}.tar"
                entry = write_shard(path, itertools.chain((first,), itertools.islice(samples, per_shard - 1)))
                line = dataclasses.replace(
                    self.pending, entry=entry, end=self.end, inputs=self.inputs(start, self.end)
                )
                building.add(line)
                self.report.add(line)
                entries.append(entry)
                start, self.pending = self.end, Finished(self.name)
        self.report.add(self.pending)  # bad rows behind the last shard
        if entries:
            write_shard_list(folder, entries)
        else:
            folder.rmdir()
        return entries

    def inputs(self, start: int, end: int) -> str:
        """The digest of everything that determines the bytes of these rows."""
        digest = xxhash.xxh3_128(repr((*_versions(), *dataclasses.astuple(self.options)[:3])).encode())
        for row in self.rows[start:end]:
            files = [_size_and_time(self.root / name) for name in row.files]
            digest.update(json.dumps([row_fields(row), files]).encode())
        return digest.hexdigest()

    def _samples(self) -> Generator[EncodedSample, None, None]:
        """The good ones in order; the others go into the report, and too many of them end the command."""
        todo = self.rows[self.end :]
        chunks = [todo[start : start + _ROWS_A_TASK] for start in range(0, len(todo), _ROWS_A_TASK)]
        encode = functools.partial(_encode_rows, root=self.root, options=self.options)
        with contextlib.closing(map_in_order(encode, chunks, self.options.workers)) as results:
            for sample in itertools.chain.from_iterable(results):
                row = self.rows[self.end]
                self.end += 1
                self.progress.advance()
                if isinstance(sample, EncodedSample):
                    self.pending.blank_texts += bool(row.text) and "text" not in row.modalities
                    self.pending.members = sorted({*self.pending.members, *sample.members})
                    yield sample
                else:
                    log.warning("skipped %s: %s", sample.key, sample.reason)
                    self.pending.skipped.append(sample)
                    self._check([*self.report.skipped, *self.pending.skipped])

    def _check(self, skipped: Sequence[BadSample]) -> None:
        """Continue while all problems can still be listed; the total is checked at the end."""
        if len(skipped) > MOST_NAMED:
            self.report.check(skipped)


def encode_row(row: Row, root: Path, options: ShardOptions) -> EncodedSample | BadSample:
    """The members of a row's sample; the only place that skips a broken file or document."""
    if row.parts is not None:
        return _encode_document(row, root, options)
    if not row.modalities:
        others = f" (its other fields: {', '.join(row.extra)})" if row.extra else ""
        what = "a blank text and no image or audio" if row.text else "no image, audio or text"
        return BadSample(row.key, f"it has {what}{others}")
    members: dict[str, bytes] = {}
    try:
        for kind, name in (("image", row.image), ("audio", row.audio)):
            if name:
                media = member(kind, root / name, options.image_size, options.audio_rate)
                members[media.suffix] = media.data
    except ValueError as error:
        return BadSample(row.key, str(error))
    if "text" in row.modalities:
        members["txt"] = (row.text or "").encode()
    members["json"] = json.dumps(sample_fields(row), ensure_ascii=False).encode()
    return EncodedSample(row.key, members)


def _encode_document(row: Row, root: Path, options: ShardOptions) -> EncodedSample | BadSample:
    members: dict[str, bytes] = {}
    parts: list[dict[str, Any]] = []
    try:
        for number, part in enumerate(parts_of(row.parts)):
            if part.text is not None:
                parts.append({part.name: part.text, **part.other})
                continue
            if part.name not in DECODED and not is_inside(part.path, root):
                raise ValueError(
                    f"part {number} of {PARTS}: {part.path} lies outside of the manifest's folder, and only images "
                    f"and audio are taken from there; copy it into the folder"
                )
            media = member(part.name, root / part.path, options.image_size, options.audio_rate)
            members[f"{number}.{media.suffix}"] = media.data
            parts.append({"member": f"{number}.{media.suffix}", **part.other})
        data = json.dumps({**sample_fields(row), PARTS: parts}, ensure_ascii=False).encode()
        if len(data) > MAX_META_BYTES:
            raise ValueError(f"its texts and fields take {len(data):,} bytes, at most {MAX_META_BYTES:,} are read")
    except ValueError as error:
        return BadSample(row.key, str(error))
    return EncodedSample(row.key, {**members, "json": data})


def _unread_files(rows: Sequence[Row]) -> Counter[tuple[str, str]]:
    """Fields of other names that seem to name the file that their row lacks: (field, image or audio) -> rows."""
    found: Counter[tuple[str, str]] = Counter()
    for row in (row for row in rows if row.parts is None):
        for name, value in row.extra.items():
            kind = format_of(Path(value).suffix[1:].lower()) if isinstance(value, str) else None
            if kind in ("image", "audio") and kind not in row.modalities and "://" not in value:
                found[name, kind] += 1
    return found


def _order(row: Row) -> tuple[bytes, str]:
    return xxhash.xxh3_64_digest(row.key.encode()), row.key


def _encode_rows(rows: Sequence[Row], root: Path, options: ShardOptions) -> list[EncodedSample | BadSample]:
    return [encode_row(row, root, options) for row in rows]


def _worst(skipped: Sequence[BadSample]) -> str:
    named = [f"{bad.key} ({bad.reason})" for bad in skipped[:MOST_NAMED]]
    if len(skipped) > MOST_NAMED:
        named.append(f"and {len(skipped) - MOST_NAMED} more")
    return "; ".join(named)


@functools.cache
def _versions() -> tuple[str, ...]:
    """Of what makes the bytes."""
    return __version__, *map(importlib.metadata.version, ("pillow", "soundfile", "soxr"))


def _size_and_time(path: Path) -> tuple[int, int] | None:
    """The size and modification time of a file, to detect changes; None if it is missing."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _write_skipped(path: Path, skipped: Sequence[BadSample]) -> None:
    lines = [json.dumps({"key": bad.key, "reason": bad.reason}, ensure_ascii=False) + "\n" for bad in skipped]
    path.write_text("".join(lines), encoding="utf-8")
