"""Where the bytes of a row's file lie: a path or URL, a range of an archive, or a cell of a Parquet file.

A ``Ref`` is small and plain: rows with refs lie on disk as JSON and go to worker processes, and only ``Reader`` opens
what they name.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mmmoe_pretrain.data.sources.listing import is_remote
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.rows.columnar import CELLS_AT_ONCE, Cells, batches, open_arrow, open_parquet, reason
from mmmoe_pretrain.limits import MAX_MEMBER_BYTES
from mmmoe_pretrain.untrusted import read_bytes
from mmmoe_pretrain.urls import redacted

MOST_COLUMNS = 2  # of row groups, which are open


class Range(NamedTuple):
    """The file ``name`` of ``size`` bytes within ``path``, a tar or zip, from ``start`` on. ``packed``: the bytes it
    takes there by deflate; None: it lies there as it is. ``crc``: the CRC-32 that a zip has of it."""

    path: str
    name: str
    start: int
    size: int
    packed: int | None = None
    crc: int | None = None


class Cell(NamedTuple):
    """The bytes in ``column`` of row ``row`` of a row group of the Parquet file ``path``."""

    path: str
    name: str
    column: str
    group: int
    row: int


Ref = str | Range | Cell


def file_name(ref: Ref) -> str:
    """The name of the file, whose suffix says its format; of a URL without its query."""
    path = ref if isinstance(ref, str) else ref.name
    if isinstance(ref, str) and is_remote(ref):
        path = ref.partition("?")[0].partition("#")[0]
    return printable(PurePosixPath(path).name)


def shown(ref: Ref) -> str:
    """For a message."""
    return printable(redacted(ref) if isinstance(ref, str) else f"{ref.name} in {redacted(ref.path)}")


def printable(name: str) -> str:
    """``name`` for a message, on one line: ``\\udce9`` in the place of bytes that are no UTF-8."""
    return name if name.isprintable() else "".join(x if x.isprintable() else ascii(x)[1:-1] for x in name)


def ref_from(value: Any) -> Ref:
    """A ref as JSON has it: a string, or the fields of a Range or Cell as a list."""
    if isinstance(value, str):
        return value
    return Cell(*value) if isinstance(value[2], str) else Range(*value)


class Reader:
    """Reads refs. Paths are relative to ``root``; ``fetch`` returns the content of a URL."""

    def __init__(self, root: Path, files: Files | None = None, fetch: Callable[[str], bytes] | None = None) -> None:
        self._root, self._files = root, files or Files()
        self._fetch = fetch
        self._cells = functools.lru_cache(MOST_COLUMNS)(self._open_cells)
        self._arrow = functools.lru_cache(MOST_COLUMNS)(open_arrow)

    def read(self, ref: Ref, most: int = MAX_MEMBER_BYTES) -> bytes:
        """The bytes, at most ``most`` of a file. Raises ValueError, in one line with the name of the file, where they
        cannot be read."""
        try:
            if isinstance(ref, Range):
                return self._range(ref, most)
            if isinstance(ref, Cell):
                return self._cell(ref)
            if is_remote(ref):
                if self._fetch is not None:
                    return self._fetch(ref)
                return self._files.download(ref.replace("$", "%24"), most)  # others wrote it: it names no variable
            return read_bytes(self._root / ref, most)
        except OSError as error:
            raise ValueError(f"{shown(ref)} cannot be read: {error.strerror or error}") from None

    def stamp(self, ref: Ref) -> tuple[int, ...] | None:
        """What changes when the file does, or another of its size and time takes its name: size, times and number of
        the file; None where it is missing, and of a URL, which is not asked for each of its files."""
        path = ref if isinstance(ref, str) else ref.path
        if is_remote(path):
            return None
        try:
            status = os.stat(self._root / path)
        except (OSError, ValueError):
            return None
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino

    def _range(self, ref: Range, most: int) -> bytes:
        if max(ref.size, ref.packed or 0) > most:
            raise ValueError(f"{shown(ref)} has {ref.size} bytes, and at most {most} are read")
        path = ref.path if is_remote(ref.path) else str(self._root / ref.path)
        data = self._files.read(path, ref.start, ref.size) if ref.packed is None else self._unpacked(ref, path)
        if ref.crc is not None and zlib.crc32(data) != ref.crc:
            raise ValueError(
                f"{shown(ref)} is damaged: its bytes have not the checksum in the archive; make it again"
            )
        return data

    def _unpacked(self, ref: Range, path: str) -> bytes:
        packed = self._files.read(path, ref.start, ref.packed or 0)
        unpack = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = unpack.decompress(packed, ref.size + 1)
        except zlib.error as error:
            raise ValueError(f"{shown(ref)} is damaged: {error}") from None
        if len(data) != ref.size:
            raise ValueError(f"{shown(ref)} is damaged: it has not the {ref.size} bytes that the archive says")
        return data

    def _cell(self, ref: Cell) -> bytes:
        import pyarrow

        try:
            value = self._cells(ref.path, ref.group, ref.column)[ref.row].as_py()
        except (pyarrow.ArrowException, MemoryError, OSError, IndexError) as error:
            raise ValueError(f"{redacted(ref.path)} cannot be read: {reason(error)}") from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError(f"{shown(ref)} holds no bytes in column {ref.column}")
        return data

    def _open_cells(self, path: str, group: int, column: str) -> Any:
        place = path if is_remote(path) else str(self._root / path)
        if path.endswith(".arrow"):
            return self._arrow(place)[group].column(column)

        def read() -> Iterator[Any]:
            with open_parquet(place, self._files) as file:
                yield from batches(file, group, [column], CELLS_AT_ONCE)

        return Cells(read)
