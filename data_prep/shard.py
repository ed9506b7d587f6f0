"""``mmmoe-data shard``: a manifest becomes shards, one folder a split.

Rows are ordered by a hash of their keys, so every shard is a mix and the same input gives the same
bytes at any number of workers, and after any number of runs that were ended (``building.py``).
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
from data_prep.shard_files import BadSample, EncodedSample, hash_file, write_shard, write_shard_list
from mmmoe_pretrain import __version__
from mmmoe_pretrain.data.shards import index_path
from mmmoe_pretrain.limits import MAX_META_BYTES
from mmmoe_pretrain.modalities import format_of
from mmmoe_pretrain.progress import Progress

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
    """What was written, by split, and what was skipped."""

    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: list[BadSample] = field(default_factory=list)
    blank_texts: int = 0  # of samples that have an image or audio
    kept: int = 0  # shards that an earlier run had finished
    members: set[str] = field(default_factory=set)  # the suffixes in any sample

    def add(self, line: Finished) -> None:
        self.skipped += line.skipped
        self.blank_texts += line.blank_texts
        self.members.update(line.members)


def run(manifest: Path, out: Path, filters: Sequence[str], options: ShardOptions) -> None:
    """The command: read, filter, write, and print a summary."""
    path = manifest_path(manifest)
    report = shard_manifest(filter_rows(read_manifest(path), filters), path.parent, out, options)
    table = Table("split", "shards", "samples", "bytes")
    for split, entries in report.shards.items():
        table.add_row(
            split,
            f"{len(entries):,}",
            f"{sum(entry['nsamples'] for entry in entries):,}",
            f"{sum(entry['filesize'] for entry in entries):,}",
        )
    console = Console()
    console.print(table)
    if report.kept:
        console.print(f"kept {report.kept:,} shards that an earlier run had finished", highlight=False)
    if report.skipped:
        console.print(f"skipped {len(report.skipped)} broken samples, named in {out / SKIPPED}", highlight=False)
    if report.blank_texts:
        console.print(
            f"skipped {report.blank_texts:,} blank texts of samples with an image or audio", highlight=False
        )


def shard_manifest(rows: Sequence[Row], root: Path, out: Path, options: ShardOptions) -> Report:
    """Write ``rows``, whose paths are relative to ``root``, as shards under ``out``."""
    _check_options(options)
    if not rows:
        raise ValueError("no rows to write; loosen --filter")
    if outside := files_outside(rows, root):
        log.warning("%d files lie outside of %s, the manifest's folder, such as %s", len(outside), root, outside[0])
    for (name, kind), count in _unread_files(rows).items():
        log.warning("field %s names files in %d rows and is not read; call it %s", name, count, kind)
    report = Report()
    budget = int(options.max_bad_fraction * len(rows))
    with Building(out, options.overwrite) as building, Progress("sharding", len(rows), "samples") as progress:
        for split in SPLITS:
            ordered = sorted((row for row in rows if row.split == split), key=_order)
            if ordered:
                work = _Split(split, ordered, root, options, report, progress)
                if entries := work.write(building, budget, len(rows)):
                    report.shards[split] = entries
        if report.shards:
            _check_budget(report.skipped, budget, options, len(rows))
        else:
            raise ValueError(f"all {len(rows)} samples are broken: {_worst(report.skipped)}")
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
    since: Finished = field(init=False)  # the shard before

    def __post_init__(self) -> None:
        self.since = Finished(self.name)

    def write(self, building: Building, budget: int, total: int) -> list[dict[str, Any]]:
        """The entries of ``shards.json``, which is not written where there are none; shards that an earlier run has
        finished are kept."""
        per_shard, folder = self.options.samples_per_shard, building.folder / self.name
        kept = building.begin(self.name, len(self.rows), per_shard, self.inputs)
        for line in kept:
            self.report.add(line)
            self.end = line.end
        self.report.kept += len(kept)
        self._check(self.report.skipped, budget, total)
        if kept:
            self.progress.restart(self.progress.done + self.end, self.progress.total)
        entries, start = [line.entry for line in kept], self.end
        with contextlib.closing(self._samples(budget, total)) as samples:
            for first in samples:  # taking the first one ahead means that no shard is empty
                path = folder / f"{len(entries):05d}.tar"
                entry = write_shard(path, itertools.chain((first,), itertools.islice(samples, per_shard - 1)))
                line = dataclasses.replace(
                    self.since, entry=entry, index=hash_file(index_path(path)), end=self.end,
                    inputs=self.inputs(start, self.end),
                )  # fmt: skip
                building.add(line)
                self.report.add(line)
                entries.append(entry)
                start, self.since = self.end, Finished(self.name)
        self.report.add(self.since)  # bad rows behind the last shard
        if entries:
            write_shard_list(folder, entries)
        else:
            folder.rmdir()
        return entries

    def inputs(self, start: int, end: int) -> str:
        """The digest of everything that determines the bytes of these rows."""
        digest = xxhash.xxh3_128(repr((*_versions(), *dataclasses.astuple(self.options)[:3])).encode())
        for row in self.rows[start:end]:
            files = [_stamp(self.root / name) for name in row.files]
            digest.update(json.dumps([row_fields(row), files]).encode())
        return digest.hexdigest()

    def _samples(self, budget: int, total: int) -> Generator[EncodedSample, None, None]:
        """The good ones in order; the others go into the report, which ends the command past ``budget``."""
        todo = self.rows[self.end :]
        chunks = [todo[start : start + _ROWS_A_TASK] for start in range(0, len(todo), _ROWS_A_TASK)]
        encode = functools.partial(_encode_chunk, root=self.root, options=self.options)
        with contextlib.closing(map_in_order(encode, chunks, self.options.workers)) as results:
            for sample in itertools.chain.from_iterable(results):
                row = self.rows[self.end]
                self.end += 1
                self.progress.advance()
                if isinstance(sample, EncodedSample):
                    self.since.blank_texts += bool(row.text) and "text" not in row.modalities
                    self.since.members = sorted({*self.since.members, *sample.members})
                    yield sample
                else:
                    log.warning("skipped %s: %s", sample.key, sample.reason)
                    self.since.skipped.append(sample)
                    self._check([*self.report.skipped, *self.since.skipped], budget, total)

    def _check(self, skipped: Sequence[BadSample], budget: int, total: int) -> None:
        """Continue while all problems can still be listed; the total is checked at the end."""
        if len(skipped) > MOST_NAMED:
            _check_budget(skipped, budget, self.options, total)


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


def _encode_chunk(rows: Sequence[Row], root: Path, options: ShardOptions) -> list[EncodedSample | BadSample]:
    return [encode_row(row, root, options) for row in rows]


def _check_budget(skipped: Sequence[BadSample], budget: int, options: ShardOptions, total: int) -> None:
    if len(skipped) > budget:
        raise ValueError(
            f"{len(skipped)} of {total} samples cannot be used, and --max-bad-fraction {options.max_bad_fraction:g} "
            f"allows {budget}; fix them, or raise it: {_worst(skipped)}"
        )


def _worst(skipped: Sequence[BadSample]) -> str:
    named = [f"{bad.key} ({bad.reason})" for bad in skipped[:MOST_NAMED]]
    return "; ".join([*named, *([f"and {len(skipped) - MOST_NAMED} more"] if len(skipped) > MOST_NAMED else [])])


@functools.cache
def _versions() -> tuple[str, ...]:
    """Of what makes the bytes."""
    return __version__, *map(importlib.metadata.version, ("pillow", "soundfile", "soxr"))


def _stamp(path: Path) -> tuple[int, int] | None:
    """The state of a file, to detect changes; None if it is missing."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def _write_skipped(path: Path, skipped: Sequence[BadSample]) -> None:
    lines = [json.dumps({"key": bad.key, "reason": bad.reason}, ensure_ascii=False) + "\n" for bad in skipped]
    path.write_text("".join(lines), encoding="utf-8")


def _check_options(options: ShardOptions) -> None:
    if options.samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard {options.samples_per_shard} must be at least 1")
    if options.image_size is not None and options.image_size < 1:
        raise ValueError(f"--image-size {options.image_size} must be at least 1 pixel")
    if options.audio_rate is not None and not 1000 <= options.audio_rate <= 192_000:
        raise ValueError(f"--audio-rate {options.audio_rate} must be between 1000 and 192000 Hz")
    if not 0 <= options.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction {options.max_bad_fraction} must be between 0 and 1")
