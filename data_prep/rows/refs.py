"""Where the bytes of a row's file lie: a path or URL, a range of an archive, or a cell of a Parquet file.

A ``Ref`` is small and plain: rows with refs lie on disk as JSON and go to worker processes, and only ``Reader`` opens
what they name.
"""

from __future__ import annotations

import functools
import io
import os
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mmmoe_pretrain.data.sources.listing import is_remote
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.limits import MAX_MEMBER_BYTES
from mmmoe_pretrain.untrusted import read_bytes
from mmmoe_pretrain.urls import redacted

PARQUET_GROUPS = 2  # row groups kept in memory: rows of one are read together


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
        self._group = functools.lru_cache(PARQUET_GROUPS)(self._read_group)
        self._arrow = functools.lru_cache(PARQUET_GROUPS)(open_arrow)

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
        value = self._group(ref.path, ref.group, ref.column)[ref.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise ValueError(f"{shown(ref)} holds no bytes in column {ref.column}")
        return data

    def _read_group(self, path: str, group: int, column: str) -> Any:
        import pyarrow

        place = path if is_remote(path) else str(self._root / path)
        try:
            if path.endswith(".arrow"):
                return self._arrow(place)[group].column(column)
            with open_parquet(place, self._files) as file:
                return file.read_row_group(group, columns=[column]).column(0).combine_chunks()
        except (pyarrow.ArrowException, OSError, IndexError) as error:
            raise ValueError(f"{redacted(path)} cannot be read: {str(error).partition(chr(10))[0]}") from None


def open_parquet(path: str, files: Files) -> Any:
    """The open ``ParquetFile`` at a path or URL."""
    from pyarrow import parquet

    return parquet.ParquetFile(RandomFile(path, files) if is_remote(path) else path, pre_buffer=False)


def open_arrow(path: str) -> list[Any]:
    """The record batches of an Arrow stream, which stay on disk; nothing in them points outside of it."""
    import pyarrow

    with pyarrow.memory_map(path) as file:
        batches: list[Any] = list(pyarrow.ipc.open_stream(file))
    for batch in batches:
        batch.validate(full=True)
    return batches


class RandomFile(io.RawIOBase):
    """A remote file that is read at any place, as libraries want one."""

    def __init__(self, path: str, files: Files) -> None:
        self._path, self._files, self._at, self._size = path, files, 0, files.stat(path).size
        if self._size < 0:
            raise ValueError(f"the server of {redacted(path)} does not tell its size; download it first")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._at))
        buffer[:size] = self._files.read(self._path, self._at, size)
        self._at += size
        return size
