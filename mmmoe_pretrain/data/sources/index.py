"""The index of a source in one memory-mapped file: where the members of every sample are.

    magic | rows of shard 0 | rows of shard 1 | ... | tables | JSON | tail

Rows of a shard with n samples and m members: ``offset`` uint64 [m]; ``kind`` int32 [n], the number of the sample's
extensions in the JSON; ``key_end``, ``member_end`` uint32 [n]; ``size`` uint32 [m] (a member of 4 GiB or more, which
is never read, has 2^32 - 1); the keys as UTF-8; zeros up to a multiple of 8. Tables: ``at`` [S + 1] (where the rows
begin), ``first`` [S + 1] (the number of the first sample), ``members`` [S], ``bytes`` [S] (of the shard), int64, and
``digest`` uint64 [S] (xxh3 of the rows). JSON: the shards as [name, version], the kinds as lists of extensions,
and of each kind the number of samples and the first one. All integers are little-endian.

Nothing in the file is trusted: its outline is checked when it is opened, the rows of a shard when they are first read
by a process. At most ``RESIDENT_BYTES`` of the rows stay in memory.
"""

from __future__ import annotations

import glob
import json
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import xxhash

from mmmoe_pretrain.limits import MAX_KEY_BYTES
from mmmoe_pretrain.untrusted import parse_json

MAGIC = b"MMMOEIDX"
VERSION = 1
LARGEST = (1 << 32) - 1  # a stored size
MAX_JSON_BYTES = 256 << 20
RESIDENT_BYTES = 16 << 20
_TAIL = struct.Struct("<IIQQQQ8s")  # version, zero, shards, start of the tables, size of the JSON, digest, magic

Kind = tuple[str, ...]  # the extensions of a sample's members, in their order


@dataclass(frozen=True)
class Rows:
    """The samples of one shard. ``kind`` [n] counts ``kinds``; ``offset``, ``size`` [m] are of the members."""

    keys: bytes
    key_end: np.ndarray
    kinds: tuple[Kind, ...]
    kind: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)

    def key(self, i: int) -> str:
        """The key of sample ``i``."""
        return self.keys[int(self.key_end[i - 1]) if i else 0 : int(self.key_end[i])].decode()

    def samples(self) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
        """The key of each sample, and (offset, size) of its members by their extensions."""
        member = 0
        for i, kind in enumerate(self.kind.tolist()):
            part = slice(member, member + len(self.kinds[kind]))
            places = zip(self.offset[part].tolist(), self.size[part].tolist(), strict=True)
            yield self.key(i), dict(zip(self.kinds[kind], places, strict=True))
            member = part.stop


class DamagedIndex(ValueError):
    """An index that is to be made again."""


class _Block:
    """The rows of a shard in the file, as arrays."""

    def __init__(self, data: memoryview, samples: int, members: int) -> None:
        at = 0

        def take(kind: str, count: int) -> np.ndarray:
            nonlocal at
            array = np.frombuffer(data, kind, count, at)
            at += array.nbytes
            return array

        self.offset = take("<u8", members)
        self.kind, self.key_end, self.member_end = take("<i4", samples), take("<u4", samples), take("<u4", samples)
        self.size = take("<u4", members)
        self.keys = data[at:]


class Index:
    """An open index. Raises DamagedIndex where it cannot be right, FileNotFoundError where it is absent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < len(MAGIC) + _TAIL.size:
                raise self._damaged("is too short")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        version, _, shards, tables, json_size, digest, magic = _TAIL.unpack(self._map[-_TAIL.size :])
        if magic != MAGIC or self._map[: len(MAGIC)] != MAGIC:
            raise self._damaged("does not begin and end as an index")
        if version != VERSION:
            raise self._damaged(f"has version {version}, and {VERSION} is read here")
        json_at, end = tables + 8 * (5 * shards + 2), len(self._map) - _TAIL.size
        if json_at + json_size != end or json_size > MAX_JSON_BYTES or tables % 8:
            raise self._damaged("is truncated")
        if xxhash.xxh3_64_intdigest(self._map[tables:end]) != digest:
            raise self._damaged("has other tables than were written")
        sizes = [shards + 1, shards + 1, shards, shards, shards]
        numbers = np.frombuffer(self._map, "<i8", sum(sizes), tables)
        self.at, self.first, self.members, self.bytes, digests = np.split(numbers, np.cumsum(sizes)[:-1])
        self._digests = digests.view("<u8")
        self._read_json(self._map[json_at:end])
        self._check_tables(tables)
        self._checked = np.zeros(shards, dtype=bool)
        self._blocks: dict[int, _Block] = {}  # the rows that pages are in memory of
        self._resident = 0  # bytes of them

    def __len__(self) -> int:
        return int(self.first[-1])

    def shard_of(self, i: int) -> tuple[int, int]:
        """The shard of sample ``i``, and its number there."""
        shard = int(np.searchsorted(self.first, i, side="right")) - 1
        return shard, i - int(self.first[shard])

    def key(self, i: int) -> str:
        shard, row = self.shard_of(i)
        block = self.block(shard)
        start = int(block.key_end[row - 1]) if row else 0
        return str(block.keys[start : int(block.key_end[row])], "utf-8", "replace")

    def places(self, i: int) -> tuple[int, int, list[tuple[int, int]]]:
        """The shard of sample ``i``, the number of its kind, and (offset, size) of its members."""
        shard, row = self.shard_of(i)
        block = self.block(shard)
        kind, end = int(block.kind[row]), int(block.member_end[row])
        part = slice(end - len(self.kinds[kind]), end)
        return shard, kind, list(zip(block.offset[part].tolist(), block.size[part].tolist(), strict=True))

    def sizes(self, indices: np.ndarray, column: np.ndarray) -> np.ndarray:
        """int64 [n]: of each sample the size of its member number ``column[kind]``; 0 where that is -1."""
        found = np.zeros(len(indices), dtype=np.int64)
        shards = np.searchsorted(self.first, indices, side="right") - 1
        counts = self._lengths
        for shard in np.unique(shards).tolist():
            here = np.flatnonzero(shards == shard)
            rows, block = np.asarray(indices)[here] - self.first[shard], self.block(shard)
            kind = block.kind[rows]
            member = block.member_end[rows].astype(np.int64) - counts[kind] + column[kind]
            known = column[kind] >= 0
            found[here[known]] = block.size[member[known]]
        return found

    def with_kind(self, kind: int, most: int | None = None) -> Iterator[np.ndarray]:
        """The samples of this kind in order, shard by shard, int64 [n]; with ``most`` at least one and about as many
        at most, spread over the shards."""
        shards: Iterable[int] = range(len(self.bytes))
        if most is not None:
            chosen = np.linspace(0, len(self.bytes) - 1, most).astype(int).tolist()
            shards = sorted({*chosen, self.shard_of(self.first_of[kind])[0]})
        each = None if most is None else -(-most // len(list(shards)))
        for shard in shards:
            held = np.flatnonzero(self.block(shard).kind == kind)
            if each is not None and len(held):
                held = held[np.unique(np.linspace(0, len(held) - 1, each).astype(int))]
            yield held + self.first[shard]

    def check(self) -> None:
        """Check the rows of all shards. Raises DamagedIndex."""
        for shard in range(len(self.bytes)):
            self.block(shard)

    def block(self, shard: int) -> _Block:
        """The rows of a shard."""
        if shard in self._blocks:
            return self._blocks[shard]
        data = memoryview(self._map)[int(self.at[shard]) : int(self.at[shard + 1])]
        samples = int(self.first[shard + 1] - self.first[shard])
        block = _Block(data, samples, int(self.members[shard]))
        if not self._checked[shard]:
            if xxhash.xxh3_64_intdigest(data) != int(self._digests[shard]) or not self._is_sound(block, shard):
                raise self._damaged(f"has damaged rows of shard {self.names[shard]}")
            self._checked[shard] = True
        self._resident += len(data)
        if self._resident > RESIDENT_BYTES:  # the kernel drops the pages, and reads them again where they are needed
            self._blocks.clear()
            self._map.madvise(mmap.MADV_DONTNEED)
            self._resident = len(data)
        self._blocks[shard] = block
        return block

    def holds(self, shard: int, rows: Rows) -> bool:
        """Whether the samples of a shard are these."""
        block = self.block(shard)
        return (
            np.array_equal(block.offset, rows.offset)
            and np.array_equal(block.size, np.minimum(rows.size, LARGEST))
            and np.array_equal(block.key_end, rows.key_end)
            and bytes(block.keys[: len(rows.keys)]) == rows.keys
            and [self.kinds[kind] for kind in block.kind] == [rows.kinds[kind] for kind in rows.kind]
        )

    def copy_rows(self, shard: int) -> bytes:
        """The rows of a shard as they are in the file."""
        self.block(shard)
        return self._map[int(self.at[shard]) : int(self.at[shard + 1])]

    def _read_json(self, data: bytes) -> None:
        try:
            held = parse_json(data, str(self.path), MAX_JSON_BYTES)
            self.names = [str(name) for name, _ in held["shards"]]
            self.versions = [str(version) for _, version in held["shards"]]
            self.kinds: list[Kind] = [tuple(str(extension) for extension in kind) for kind in held["kinds"]]
            self.counts = np.asarray(held["counts"], dtype=np.int64).reshape(-1)
            self.first_of = [int(sample) for sample in held["firsts"]]  # of each kind
        except (ValueError, TypeError, KeyError, OverflowError):
            raise self._damaged("holds no list of shards and kinds") from None
        self._lengths = np.asarray([len(kind) for kind in self.kinds], dtype=np.int64)

    def _check_tables(self, tables: int) -> None:
        least = 8 * self.members + 12 * np.diff(self.first) + 4 * self.members
        ok = (
            len(self.bytes) > 0
            and len(self.names) == len(self.bytes)
            and self.at[0] == len(MAGIC) and self.at[-1] == tables and not (self.at % 8).any()
            and self.first[0] == 0 and (np.diff(self.first) > 0).all()
            and (self.members >= 0).all() and (self.members < 1 << 40).all() and (self.first < 1 << 56).all()
            and (np.diff(self.at) >= least).all()
            and len(self.counts) == len(self.kinds) > 0 and (self.counts >= 0).all()
            and self.counts.sum() == self.first[-1]
            and len(self.first_of) == len(self.kinds) and all(0 <= i < self.first[-1] for i in self.first_of)
        )  # fmt: skip
        if not ok:
            raise self._damaged("has tables that do not fit together")

    def _is_sound(self, block: _Block, shard: int) -> bool:
        if block.kind.min() < 0 or block.kind.max() >= len(self.kinds):
            return False
        lengths = np.diff(block.key_end.astype(np.int64), prepend=0)
        ends = np.cumsum(self._lengths[block.kind])
        return bool(
            lengths.min() > 0 and lengths.max() <= MAX_KEY_BYTES and 0 <= len(block.keys) - int(block.key_end[-1]) < 8
            and np.array_equal(ends, block.member_end) and (not len(ends) or ends[-1] == len(block.size))
            and (block.offset <= self.bytes[shard]).all()
            and (block.offset + block.size <= self.bytes[shard]).all()
        )  # fmt: skip

    def _damaged(self, why: str) -> DamagedIndex:
        return DamagedIndex(f"the index {self.path} {why}; remove it, and it is made again")


def draft_of(path: Path) -> Path:
    """Where this process writes what becomes ``path``."""
    return path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")


def drafts_of(path: Path) -> list[Path]:
    """Those of all processes."""
    return list(path.parent.glob(f"{glob.escape(path.name)}.*-*.tmp"))


class Writer:
    """Writes an index to ``path`` by a temporary file, which is renamed at the end of ``with``."""

    def __init__(self, path: Path, kinds: Sequence[Kind] = ()) -> None:
        """``kinds``: those of rows that are copied from another index."""
        self._path, self._draft = path, draft_of(path)
        self._kinds = {kind: number for number, kind in enumerate(kinds)}
        self._counts: dict[int, int] = {}
        self._firsts: dict[int, int] = {}
        self._shards: list[tuple[str, str]] = []
        self._at, self._first = [len(MAGIC)], [0]
        self._members: list[int] = []
        self._bytes: list[int] = []
        self._digests: list[int] = []

    def __enter__(self) -> Writer:
        self._file = self._draft.open("wb")
        self._file.write(MAGIC)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
            self._file.close()
            if error is None:
                os.replace(self._draft, self._path)
        finally:
            self._file.close()
            self._draft.unlink(missing_ok=True)

    def add(self, name: str, version: str, size: int, rows: Rows) -> None:
        """The samples of the next shard."""
        own = [self._kinds.setdefault(kind, len(self._kinds)) for kind in rows.kinds]
        kind = np.asarray(own, dtype="<i4")[rows.kind]
        lengths = np.asarray([len(kind) for kind in rows.kinds], dtype=np.int64)[rows.kind]
        arrays = (
            rows.offset.astype("<u8"), kind, rows.key_end.astype("<u4"), np.cumsum(lengths).astype("<u4"),
            np.minimum(rows.size, LARGEST).astype("<u4"),
        )  # fmt: skip
        data = b"".join((*(array.tobytes() for array in arrays), rows.keys))
        self._add(name, version, size, data + bytes(-len(data) % 8), kind, len(rows.size))

    def copy(self, index: Index, shard: int, name: str) -> None:
        """The samples of a shard of ``index``, whose kinds this began with."""
        data, kind = index.copy_rows(shard), index.block(shard).kind
        size, members = int(index.bytes[shard]), int(index.members[shard])
        self._add(name, index.versions[shard], size, data, kind, members)

    def _add(self, name: str, version: str, size: int, data: bytes, kind: np.ndarray, members: int) -> None:
        self._file.write(data)
        found = np.unique(kind, return_index=True, return_counts=True)
        for number, row, count in zip(*(array.tolist() for array in found), strict=True):
            self._counts[number] = self._counts.get(number, 0) + count
            self._firsts.setdefault(number, self._first[-1] + row)
        self._shards.append((name, version))
        self._at.append(self._at[-1] + len(data))
        self._first.append(self._first[-1] + len(kind))
        self._members.append(members)
        self._bytes.append(size)
        self._digests.append(xxhash.xxh3_64_intdigest(data))

    def _finish(self) -> None:
        numbers = (*self._at, *self._first, *self._members, *self._bytes)
        tables = np.asarray(numbers, dtype="<i8").tobytes() + np.asarray(self._digests, dtype="<u8").tobytes()
        counts, firsts = (
            [found.get(kind, 0) for kind in self._kinds.values()] for found in (self._counts, self._firsts)
        )
        held = {"shards": self._shards, "kinds": list(self._kinds), "counts": counts, "firsts": firsts}
        text = json.dumps(held, ensure_ascii=False, separators=(",", ":")).encode()
        digest = xxhash.xxh3_64_intdigest(tables + text)
        self._file.write(tables + text)
        self._file.write(_TAIL.pack(VERSION, 0, len(self._shards), self._at[-1], len(text), digest, MAGIC))
        self._file.flush()
        os.fsync(self._file.fileno())
