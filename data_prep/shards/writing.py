"""Rows -> shards: each split in its order, cut by count and bytes, resumed after an interruption (``building.py``).

Rows are decoded and encoded by worker processes, and written by this one in their order, so that the same input gives
the same bytes with any number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import logging
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.pool import map_in_order
from data_prep.quality.filters import Filters
from data_prep.rows.refs import Reader
from data_prep.rows.spool import read_rows
from data_prep.shards.building import Building, Finished
from data_prep.shards.encode import BadSample, EncodedSample, Outcome, Task, encode_at, row_digest
from data_prep.shards.fetch import FetchOptions
from data_prep.shards.media import MediaOptions
from data_prep.shards.records import write_records
from data_prep.shards.shard_files import ShardWriter, shard_name, tar_bytes
from mmmoe_pretrain import __version__
from mmmoe_pretrain.progress import Progress, counted

log = logging.getLogger(__name__)
MOST_NAMED = 20  # samples in one message
ROWS_A_TASK = 32
TASKS_FETCHED = 16  # whose files at URLs are fetched ahead by a process


@dataclass(frozen=True, slots=True)
class ShardOptions:
    samples_per_shard: int = 10_000
    shard_bytes: int = 10**9
    media: MediaOptions = field(default_factory=MediaOptions)
    workers: int = 2
    max_bad_fraction: float = 0.01
    overwrite: bool = False
    fetch: FetchOptions = field(default_factory=FetchOptions)
    filters: Filters = field(default_factory=Filters)


@dataclass(slots=True)
class Broken:
    """The rows that are broken, of ``total``: how many, and the first ones."""

    total: int
    max_fraction: float
    count: int = 0
    named: list[BadSample] = field(default_factory=list)

    def add(self, count: int, named: Iterable[BadSample]) -> None:
        self.count += count
        self.named = [*self.named, *named][:MOST_NAMED]

    def check(self, count: int = 0, named: Iterable[BadSample] = ()) -> None:
        """Raise ValueError if they, and these, are too many."""
        count, allowed = self.count + count, int(self.max_fraction * self.total)
        if count > allowed:
            total, first = counted(self.total, "sample"), worst([*self.named, *named], count)
            raise ValueError(
                f"{count} of {total} cannot be used, and --max-bad-fraction {self.max_fraction:g} allows {allowed}; "
                f"fix them, or raise it: {first}"
            )


def worst(named: list[BadSample], count: int) -> str:
    """For a message: the first of ``count``."""
    shown = [f"{bad.key} ({bad.reason})" for bad in named[:MOST_NAMED]]
    return "; ".join([*shown, *([f"and {count - len(shown)} more"] if count > len(shown) else [])])


@dataclass(slots=True)
class SplitWriter:
    """Writes the rows of one split, which lie in a spool at ``offsets`` [n]. ``first``: the number of its first
    shard."""

    name: str
    offsets: np.ndarray
    root: Path
    spool: Path
    options: ShardOptions
    broken: Broken  # of all splits
    progress: Progress
    first: int = 0
    kept: int = 0  # shards that an earlier run had finished

    def write(self, building: Building) -> list[Finished]:
        """The shards, and perhaps a line without one: of the rows without a sample behind the last shard."""
        lines = building.begin(self.name, len(self.offsets), self.first, self._inputs)
        for line in lines:
            self.broken.add(line.broken, line.named)
        self.kept = sum(bool(line.entry) for line in lines)
        self.broken_check()
        start = lines[-1].end if lines else 0
        if start:
            self.progress.restart(self.progress.done + start, self.progress.total)
        with contextlib.closing(self._outcomes(start)) as outcomes:
            for line in self._lines(outcomes, start, building.folder / self.name, self.first + self.kept):
                building.add(line)
                self.broken.add(line.broken, line.named)
                lines.append(line)
        return lines

    def _lines(self, outcomes: Iterable[Outcome], start: int, folder: Path, number: int) -> Iterator[Finished]:
        """Each shard as it is written."""
        pending = _Pending(self, folder / shard_name(self.name, number))
        try:
            for row, outcome in enumerate(outcomes, start):
                if pending.is_too_small_for(outcome.sample):
                    yield pending.finish(row, full=True)
                    number += 1
                    pending = _Pending(self, folder / shard_name(self.name, number))
                pending.add(outcome)
                self.progress.advance()
                if pending.samples == self.options.samples_per_shard:
                    yield pending.finish(row + 1, full=True)
                    number += 1
                    pending = _Pending(self, folder / shard_name(self.name, number))
            if pending.rows:
                yield pending.finish(len(self.offsets), full=False)
        finally:
            pending.abandon()

    def _inputs(self, start: int, end: int) -> str:
        """The digest of everything that determines the bytes of these rows."""
        reader = Reader(self.root)
        return self.inputs_of(row_digest(row, reader) for row in read_rows(self.spool, self.offsets[start:end]))

    def inputs_of(self, digests: Iterable[bytes]) -> str:
        limits = self.options.samples_per_shard, self.options.shard_bytes
        settings = *limits, self.options.media, self.options.filters
        digest = xxhash.xxh3_128(repr((*_versions(), *settings)).encode())
        for each in digests:
            digest.update(each)
        return digest.hexdigest()

    def _outcomes(self, start: int) -> Generator[Outcome, None, None]:
        options = self.options
        work = functools.partial(
            encode_at,
            spool=self.spool,
            root=self.root,
            options=options.media,
            fetch=options.fetch.of_one(options.workers),
            filters=options.filters,
        )
        with contextlib.closing(map_in_order(work, self._tasks(start), options.workers)) as results:
            yield from itertools.chain.from_iterable(results)

    def _tasks(self, start: int) -> Iterator[Task]:
        turn = ROWS_A_TASK * max(1, self.options.workers)  # rows from a process's task to its next

        def rows(first: int) -> list[int]:
            return self.offsets[first : first + ROWS_A_TASK].tolist()

        for at in range(start, len(self.offsets), ROWS_A_TASK):
            following = map(rows, range(at + turn, at + turn * (TASKS_FETCHED + 1), turn))
            yield Task(rows(at), list(itertools.chain.from_iterable(following)))

    def broken_check(self, count: int = 0, named: Iterable[BadSample] = ()) -> None:
        """Continue while all problems can still be listed; the total is checked at the end."""
        if self.broken.count + count > MOST_NAMED:
            self.broken.check(count, named)


class _Pending:
    """The shard that is being written: its tar, its records, and what its line will say."""

    def __init__(self, split: SplitWriter, path: Path) -> None:
        self._split, self._path = split, path
        self._writer: ShardWriter | None = None
        self._line = Finished(split.name)
        self._records: list[dict[str, Any]] = []
        self._digests: list[bytes] = []
        self._members: set[str] = set()

    @property
    def rows(self) -> int:
        return len(self._records)

    @property
    def samples(self) -> int:
        return self._writer.count if self._writer else 0

    def is_too_small_for(self, sample: EncodedSample | BadSample) -> bool:
        if self._writer is None or isinstance(sample, BadSample):
            return False
        return self._writer.size + tar_bytes(sample.members) > self._split.options.shard_bytes

    def add(self, outcome: Outcome) -> None:
        self._records.append(outcome.record)
        self._digests.append(outcome.digest)
        sample = outcome.sample
        if isinstance(sample, EncodedSample):
            self._writer = self._writer or ShardWriter(self._path)
            self._writer.add(sample)
            self._members.update(sample.members)
        elif not sample.filtered:
            log.warning("skipped %s: %s", sample.key, sample.reason)
            self._line.broken += 1
            self._line.named = [*self._line.named, sample][:MOST_NAMED]
            self._split.broken_check(self._line.broken, self._line.named)

    def finish(self, end: int, full: bool) -> Finished:
        """Write the records, and close the tar if there is a sample."""
        write_records(self._path.with_suffix(".parquet"), self._records)
        return dataclasses.replace(
            self._line,
            entry=self._writer.close() if self._writer else {},
            end=end,
            full=full,
            inputs=self._split.inputs_of(self._digests),
            members=sorted(self._members),
        )

    def abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()


@functools.cache
def _versions() -> tuple[str, ...]:
    """Of what makes the bytes."""
    return __version__, *map(importlib.metadata.version, ("pillow", "soundfile", "soxr", "webdataset"))
