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

from data_prep.rows.row import SPLITS, Fault, Faults, Found, Row, faults, row_from_json, row_to_json
from mmmoe_pretrain.untrusted import brief

Order = str  # "shuffled": by a hash of the key; "input": as the rows come


class Spool:
    """Rows on disk. ``add`` them, ``close``, then read them by ``offsets``."""

    def __init__(self, path: Path) -> None:
        self.path, self.faults = path, Faults()
        self.counts: Counter[str] = Counter()  # rows by split
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
                self.faults.add(f"{found.where}, key {brief(urllib.parse.unquote(row.key))}", problem)
            return
        line = json.dumps(found.where).encode() + b"\t" + row_to_json(row) + b"\n"
        self._file.write(line)
        self._offset.append(self._end)
        self._hash.append(xxhash.xxh3_64_intdigest(row.key.encode()))
        self._split.append(SPLITS.index(row.split))
        self._end += len(line)
        self.counts[row.split] += 1

    def close(self, remedy: str = "") -> None:
        """No more rows come. Keys that come twice are faults; ``remedy``: what a user can do about it."""
        self._file.flush()
        every, offsets = np.frombuffer(self._hash, np.uint64), np.frombuffer(self._offset, np.uint64)
        ordered = np.sort(every)
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        places = np.flatnonzero(np.isin(every, twice)) if twice.size else np.zeros(0, dtype=np.int64)
        places = places[np.argsort(every[places], kind="stable")]
        for first, second in itertools.pairwise(read_found(self.path, offsets[places].tolist())):
            if first.row.key == second.row.key:
                self.faults.add(
                    f"{second.where}, key {brief(urllib.parse.unquote(second.row.key))}",
                    f"it is in {first.where}, too, and keys are unique over a dataset{remedy}",
                )

    def offsets(self, split: str, order: Order) -> np.ndarray:
        """Of the rows of a split, in their order."""
        mine = np.flatnonzero(np.frombuffer(self._split, np.uint8) == SPLITS.index(split))
        if order == "shuffled":
            mine = mine[np.argsort(np.frombuffer(self._hash, np.uint64)[mine], kind="stable")]
        return np.frombuffer(self._offset, np.uint64)[mine]


def read_found(path: Path, offsets: Iterable[int]) -> Iterator[Found]:
    """The rows at ``offsets``, and where they are in their input."""
    with path.open("rb") as file:
        for offset in offsets:
            file.seek(offset)
            where, _, row = file.readline().partition(b"\t")
            yield Found(json.loads(where), row_from_json(row))


def read_rows(path: Path, offsets: Iterable[int]) -> Iterator[Row]:
    """The rows at ``offsets``."""
    return (found.row for found in read_found(path, offsets))
