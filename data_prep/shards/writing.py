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

import numpy as np
import xxhash

from mmmoe_pretrain import __version__
from mmmoe_pretrain.data_prep.pool import map_in_order
from mmmoe_pretrain.data_prep.quality.filters import Filters
from mmmoe_pretrain.data_prep.rows.refs import Reader
from mmmoe_pretrain.data_prep.rows.spool import read_rows
from mmmoe_pretrain.data_prep.shards.building import Building, Finished
from mmmoe_pretrain.data_prep.shards.encode import BadSample, EncodedSample, Outcome, Task, encode_at, row_digest
from mmmoe_pretrain.data_prep.shards.fetch import FetchOptions
from mmmoe_pretrain.data_prep.shards.media import MediaOptions
from mmmoe_pretrain.data_prep.shards.records import RecordWriter
from mmmoe_pretrain.data_prep.shards.shard_files import ShardWriter, shard_name, tar_bytes
from mmmoe_pretrain.progress import Progress, counted

log = logging.getLogger(__name__)
MOST_NAMED = 20  # samples that a run names, and waits for before it stops
MOST_SHOWN = 3  # of these in one message
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


class TooManyBroken(ValueError):
    """More rows than --max-bad-fraction allows have no sample."""


@dataclass(slots=True)
class Broken:
    """The rows that are broken, of ``total``: how many, and the first ones. ``listed``: the file that names all."""

    total: int
    max_fraction: float
    listed: Path
    count: int = 0
    named: list[BadSample] = field(default_factory=list)

    def add(self, count: int, named: Iterable[BadSample]) -> None:
        self.count += count
        self.named = [*self.named, *named][:MOST_NAMED]

    def check(self, seen: int | None = None) -> None:
        """Raise TooManyBroken if they are too many. ``seen``: the rows so far; None: all."""
        allowed = int(self.max_fraction * self.total)
        if self.count <= allowed:
            return
        is_early = seen is not None and seen < self.total
        some = seen if seen is not None and is_early else self.total
        rows = f"of the first {some:,} of {self.total:,} samples" if is_early else f"of {counted(some, 'sample')}"
        least, is_passing = enough(self.count, some), any(bad.retry for bad in self.named)
        again = "; downloads that failed can then be tried again by --retry" if is_passing else ""
        raise TooManyBroken(
            f"{self.count:,} {rows} ({self.count / some:.2%}) cannot be used, and --max-bad-fraction "
            f"{self.max_fraction:g} allows {allowed:,}: {self.worst()}; {'those so far' if is_early else 'all'} are "
            f"named in {self.listed}; mend them, or leave them out by --max-bad-fraction "
            f"{least:g}{' or more' if is_early and least < 1 else ''}{again}"
        )

    def worst(self) -> str:
        """For a message: the first ones."""
        shown = [f"{bad.key} ({': '.join(filter(None, (bad.url, bad.reason)))})" for bad in self.named[:MOST_SHOWN]]
        return "; ".join([*shown, *([f"and {self.count - len(shown):,} more"] if self.count > len(shown) else [])])


def enough(count: int, total: int) -> float:
    """The least --max-bad-fraction of three decimals, or 1, that allows ``count`` of ``total``."""
    shares = (thousandths / 1000 for thousandths in range(1000 * count // total, 1000))
    return next((share for share in shares if int(share * total) >= count), 1.0)


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
    before: Path | None = None  # the folder of records of an earlier command, which this one continues
    kept: int = 0  # shards that an earlier run had finished

    def write(self, building: Building) -> list[Finished]:
        """The shards, and perhaps a line without one: of the rows without a sample behind the last shard."""
        lines = building.begin(self.name, len(self.offsets), self.first, self._inputs)
        for line in lines:
            self.broken.add(line.broken, line.named)
        self.kept = sum(bool(line.entry) for line in lines)
        start = lines[-1].end if lines else 0
        if start:
            self.progress.restart(self.progress.done + start, self.progress.total)
        self.check_broken()
        with contextlib.closing(self._outcomes(start)) as outcomes:
            for line in self._lines(outcomes, start, building.folder / self.name, self.first + self.kept):
                building.add(line)
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
                self.check_broken()
                if pending.samples == self.options.samples_per_shard:
                    yield pending.finish(row + 1, full=True)
                    number += 1
                    pending = _Pending(self, folder / shard_name(self.name, number))
            if pending.rows:
                yield pending.finish(len(self.offsets), full=False)
        except TooManyBroken:
            pending.close_records()  # which name them
            raise
        finally:
            pending.abandon()

    def _inputs(self, start: int, end: int) -> str:
        """The digest of everything that determines the bytes of these rows."""
        reader = Reader(self.root)
        digest = self.new_digest()
        for row, line in read_rows(self.spool, self.offsets[start:end]):
            digest.update(row_digest(row, line, reader))
        return digest.hexdigest()

    def new_digest(self) -> xxhash.xxh3_128:
        """Of the settings, to be updated with that of each row."""
        limits = self.options.samples_per_shard, self.options.shard_bytes
        settings = *limits, self.options.media, self.options.filters
        return xxhash.xxh3_128(repr((*_versions(), *settings)).encode())

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

    def check_broken(self) -> None:
        """Continue while they are few; the total is checked at the end."""
        if self.broken.count > MOST_NAMED:
            self.broken.check(int(self.progress.done))


class _Pending:
    """The shard that is being written: its tar, its records, and what its line will say."""

    def __init__(self, split: SplitWriter, path: Path) -> None:
        self._split, self._path = split, path
        self._writer: ShardWriter | None = None
        self._line = Finished(split.name)
        records = path.with_suffix(".parquet")  # an earlier command may have some of rows behind its last shard
        self._records = RecordWriter(records, split.before and split.before / records.name)
        self._digest = split.new_digest()
        self._members: set[str] = set()

    @property
    def rows(self) -> int:
        return self._records.count

    @property
    def samples(self) -> int:
        return self._writer.count if self._writer else 0

    def is_too_small_for(self, sample: EncodedSample | BadSample) -> bool:
        if self._writer is None or isinstance(sample, BadSample):
            return False
        return self._writer.size + tar_bytes(sample) > self._split.options.shard_bytes

    def add(self, outcome: Outcome) -> None:
        self._records.add(outcome.record)
        self._digest.update(outcome.digest)
        sample = outcome.sample
        if isinstance(sample, EncodedSample):
            self._writer = self._writer or ShardWriter(self._path)
            self._writer.add(sample)
            self._members.update(sample.members)
        elif not sample.filtered:
            log.warning("skipped %s: %s", sample.key, sample.reason)
            self._line.broken += 1
            self._line.named = [*self._line.named, sample][:MOST_NAMED]
            self._split.broken.add(1, [sample])

    def finish(self, end: int, full: bool) -> Finished:
        """Write the records, and close the tar if there is a sample."""
        self._records.close()
        return dataclasses.replace(
            self._line,
            entry=self._writer.close() if self._writer else {},
            end=end,
            full=full,
            inputs=self._digest.hexdigest(),
            members=sorted(self._members),
        )

    def close_records(self) -> None:
        if self.rows:
            self._records.close()

    def abandon(self) -> None:
        self._records.abandon()
        if self._writer is not None:
            self._writer.abandon()


@functools.cache
def _versions() -> tuple[str, ...]:
    """Of what makes the bytes."""
    return __version__, *map(importlib.metadata.version, ("pillow", "soundfile", "soxr", "webdataset"))
