"""``mmmoe-data shard``: a manifest becomes shards, one folder a split.

Rows are ordered by a hash of their keys, so every shard is a mix and the same input gives the same
bytes at any number of workers. Everything is built in ``OUT/building.tmp`` and moved when it is whole.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console
from rich.table import Table

from data_prep.manifest import SPLITS, Row, filter_rows, manifest_path, read_manifest, sample_fields
from data_prep.media import audio_member, image_member
from data_prep.shard_files import EncodedSample, write_shard, write_shard_list

log = logging.getLogger(__name__)
BUILDING = "building.tmp"
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


@dataclass(frozen=True, slots=True)
class BadSample:
    key: str
    reason: str


@dataclass(slots=True)
class Report:
    """What was written, by split, and what was skipped."""

    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: list[BadSample] = field(default_factory=list)


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
    if report.skipped:
        console.print(f"skipped {len(report.skipped)} broken samples, named in {out / SKIPPED}", highlight=False)


def shard_manifest(rows: Sequence[Row], root: Path, out: Path, options: ShardOptions) -> Report:
    """Write ``rows``, whose paths are relative to ``root``, as shards under ``out``."""
    _check_options(options)
    if not rows:
        raise ValueError("no rows to write; loosen --filter")
    building = _prepare(out, options.overwrite)
    budget = int(options.max_bad_fraction * len(rows))
    report = Report()
    for split in SPLITS:
        ordered = sorted((row for row in rows if row.split == split), key=_order)
        if ordered:
            samples = _good(_encode_all(ordered, root, options), report.skipped, budget, len(rows))
            report.shards[split] = _write_split(building / split, samples, options.samples_per_shard)
    _write_skipped(building / SKIPPED, report.skipped)
    _commit(building, out)
    return report


def encode_row(row: Row, root: Path, options: ShardOptions) -> EncodedSample | BadSample:
    """The members of a row's sample; the one place where a broken file is set aside."""
    members: dict[str, bytes] = {}
    try:
        if row.image:
            image = image_member(root / row.image, options.image_size)
            members[image.suffix] = image.data
        if row.audio:
            audio = audio_member(root / row.audio, options.audio_rate)
            members[audio.suffix] = audio.data
    except ValueError as error:
        return BadSample(row.key, str(error))
    if row.text:
        members["txt"] = row.text.encode()
    members["json"] = json.dumps(sample_fields(row), ensure_ascii=False).encode()
    return EncodedSample(row.key, members)


def _order(row: Row) -> tuple[bytes, str]:
    return xxhash.xxh3_64_digest(row.key.encode()), row.key


def _encode_all(rows: Sequence[Row], root: Path, options: ShardOptions) -> Iterator[EncodedSample | BadSample]:
    """Encode in order; a bounded number of chunks is in flight, so memory does not grow."""
    chunks = [rows[start : start + _ROWS_A_TASK] for start in range(0, len(rows), _ROWS_A_TASK)]
    if options.workers <= 1:
        for chunk in chunks:
            yield from _encode_chunk(chunk, root, options)
        return
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        waiting: deque[Future[list[EncodedSample | BadSample]]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_encode_chunk, chunk, root, options))
            if len(waiting) > 4 * options.workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()


def _encode_chunk(rows: Sequence[Row], root: Path, options: ShardOptions) -> list[EncodedSample | BadSample]:
    return [encode_row(row, root, options) for row in rows]


def _good(
    encoded: Iterable[EncodedSample | BadSample], skipped: list[BadSample], budget: int, total: int
) -> Iterator[EncodedSample]:
    for sample in encoded:
        if isinstance(sample, EncodedSample):
            yield sample
            continue
        log.warning("skipped %s: %s", sample.key, sample.reason)
        skipped.append(sample)
        if len(skipped) > budget:
            worst = "; ".join(f"{bad.key} ({bad.reason})" for bad in skipped[:5])
            raise ValueError(
                f"{len(skipped)} of {total} samples are broken and --max-bad-fraction allows {budget}: "
                f"{worst}{'; ...' if len(skipped) > 5 else ''}"
            )


def _write_split(folder: Path, samples: Iterator[EncodedSample], per_shard: int) -> list[dict[str, Any]]:
    folder.mkdir()
    entries: list[dict[str, Any]] = []
    for first in samples:  # taking the first one ahead means that no shard is empty
        chunk = itertools.chain((first,), itertools.islice(samples, per_shard - 1))
        entries.append(write_shard(folder / f"{len(entries):05d}.tar", chunk))
    write_shard_list(folder, entries)
    return entries


def _write_skipped(path: Path, skipped: Sequence[BadSample]) -> None:
    lines = [json.dumps({"key": bad.key, "reason": bad.reason}, ensure_ascii=False) + "\n" for bad in skipped]
    path.write_text("".join(lines), encoding="utf-8")


def _prepare(out: Path, overwrite: bool) -> Path:
    """An empty building folder under ``out``; what is there already stays until the new is whole."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out is a folder")
    present = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if present and not overwrite:
        raise ValueError(
            f"{out} is not empty (it has {', '.join(present[:3])}); choose another --out or pass --overwrite"
        )
    foreign = [path for split in SPLITS for path in _foreign_files(out / split)]
    if foreign:
        raise ValueError(
            f"{foreign[0]} is not of our making, so --overwrite does not remove its folder; choose another --out"
        )
    building = out / BUILDING
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    return building


def _foreign_files(folder: Path) -> list[Path]:
    suffixes = (".tar", ".index.json", ".tmp")
    return [
        path for path in sorted(folder.glob("*")) if not (path.name.endswith(suffixes) or path.name == "shards.json")
    ]


def _commit(building: Path, out: Path) -> None:
    for split in SPLITS:
        shutil.rmtree(out / split, ignore_errors=True)
    for path in sorted(building.iterdir()):
        path.replace(out / path.name)
    building.rmdir()


def _check_options(options: ShardOptions) -> None:
    if options.samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard {options.samples_per_shard} must be at least 1")
    if options.image_size is not None and options.image_size < 1:
        raise ValueError(f"--image-size {options.image_size} must be at least 1 pixel")
    if options.audio_rate is not None and not 1000 <= options.audio_rate <= 192_000:
        raise ValueError(f"--audio-rate {options.audio_rate} must be between 1000 and 192000 Hz")
    if not 0 <= options.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction {options.max_bad_fraction} must be between 0 and 1")
