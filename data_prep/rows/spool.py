"""The rows of a command on disk, so that memory does not grow with them: 17 bytes a row, and 8 more while a split is
written.

Rows are appended to one file as JSON, and read from it by their offsets, in any process.
"""

from __future__ import annotations

import itertools
import json
import urllib.parse
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from mmmoe_pretrain.data_prep.rows.row import SPLITS, Fault, Faults, Found, Row, faults, row_from_json, row_to_json
from mmmoe_pretrain.progress import counted
from mmmoe_pretrain.untrusted import brief

Order = str  # "shuffled": by a hash of the key; "input": as the rows come


def _key(found: Found) -> str:
    return brief(urllib.parse.unquote(found.row.key))


class Spool:
    """Rows on disk. ``add`` them, ``close``, then read them by ``offsets``."""

    def __init__(self, path: Path) -> None:
        self.path, self.faults = path, Faults()
        self.counts: Counter[str] = Counter()  # rows by split
        self.downloads = 0  # rows with files at URLs
        self._file, self._end = path.open("wb"), 0
        self._offset, self._hash, self._split = array("Q"), array("Q"), bytearray()

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._offset)

    def add(self, found: Found | Fault) -> None:
        """A row, whose split is decided, or what is none."""
        if isinstance(found, Fault):
            self.faults.add(*found)
            return
        row = found.row
        if problems := list(faults(row)):
            for problem in problems:
                self.faults.add(f"{found.where}, key {_key(found)}", problem)
            return
        line = json.dumps(found.where).encode() + b"\t" + row_to_json(row) + b"\n"
        self._file.write(line)
        self._offset.append(self._end)
        self._hash.append(xxhash.xxh3_64_intdigest(row.key.encode()))
        self._split.append(SPLITS.index(row.split))
        self._end += len(line)
        self.counts[row.split] += 1
        self.downloads += bool(row.urls)

    def close(self, remedy: str = "") -> None:
        """No more rows come. Keys that come twice are faults; ``remedy``: what mends all of them."""
        self._file.flush()
        every, offsets = np.frombuffer(self._hash, np.uint64), np.frombuffer(self._offset, np.uint64)
        ordered = np.sort(every)
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        places = np.flatnonzero(np.isin(every, twice)) if twice.size else np.zeros(0, dtype=np.int64)
        places = places[np.argsort(every[places], kind="stable")]
        found = read_found(self.path, offsets[places].tolist())
        equal = (pair for pair in itertools.pairwise(found) if pair[0].row.key == pair[1].row.key)
        if remedy:  # for all of them
            self._add_equal(equal, remedy)
            return
        for first, second in equal:
            where = f"{second.where}, key {_key(second)}"
            self.faults.add(where, f"it is in {first.where}, too, and keys are unique over a dataset")

    def _add_equal(self, pairs: Iterator[tuple[Found, Found]], remedy: str) -> None:
        """One fault, with the first pairs."""
        named = [f"{_key(first)} in {first.where} and {second.where}" for first, second in itertools.islice(pairs, 3)]
        more = sum(1 for _ in pairs)
        if named:
            rest = [f"and {more:,} more"] * bool(more)
            what = f"holds {counted(len(named) + more, 'sample')} with the key of another"
            self.faults.add(what, f"{'; '.join([*named, *rest])}. Keys are unique over a dataset{remedy}")

    def offsets(self, split: str, order: Order) -> np.ndarray:
        """Of the rows of a split, in their order."""
        mine = np.flatnonzero(np.frombuffer(self._split, np.uint8) == SPLITS.index(split))
        if order == "shuffled":
            mine = mine[np.argsort(np.frombuffer(self._hash, np.uint64)[mine], kind="stable")]
        return np.frombuffer(self._offset, np.uint64)[mine]


def read_found(path: Path, offsets: Iterable[int]) -> Iterator[Found]:
    """The rows at ``offsets``, and where they are in their input."""
    return (Found(json.loads(where), row_from_json(row)) for where, row in _read(path, offsets))


def read_rows(path: Path, offsets: Iterable[int]) -> Iterator[tuple[Row, bytes]]:
    """The rows at ``offsets``, each with its JSON."""
    return ((row_from_json(row), row) for _, row in _read(path, offsets))


def _read(path: Path, offsets: Iterable[int]) -> Iterator[tuple[bytes, bytes]]:
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            where, _, row = file.readline().rstrip(b"\n").partition(b"\t")
            yield where, row
