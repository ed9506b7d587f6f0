"""Parquet files and Arrow streams that others wrote, read some rows at a time within a bound on memory.

Few bytes of such a file may hold many: compressed pages, dictionaries whose values repeat, lists of any length. So
batches become smaller where they take too much memory.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmmoe_pretrain.data.sources.listing import is_remote
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.memory import memory_at_most
from mmmoe_pretrain.urls import redacted

ROWS_AT_ONCE = 1024
CELLS_AT_ONCE = 16  # of bytes
BATCH_BYTES = 256 << 20  # that several rows may take
ROW_BYTES = 2 << 30  # that one row may take, and the pages in which it lies, which are decoded whole
OBJECT_BYTES = 64 << 20  # that fields of a row may take as Python objects; a sample's JSON has at most 1 MiB
KEPT_BYTES = 256 << 20  # of cells that are kept, for rows that are not read in order
OWN_BYTES = 64 << 20  # of an Arrow stream whose buffers are on disk


def open_parquet(path: str, files: Files) -> Any:
    """The open ``ParquetFile`` at a path or URL."""
    return parquet_file(RandomFile(path, files) if is_remote(path) else path)


def parquet_file(source: Any) -> Any:
    """The ``ParquetFile`` in a file or at a path."""
    import pyarrow
    from pyarrow import parquet

    default = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(pyarrow.system_memory_pool())  # others reserve more than they take, beyond any limit
    try:
        with memory_at_most(BATCH_BYTES):
            return parquet.ParquetFile(source, pre_buffer=False)
    finally:
        pyarrow.set_memory_pool(default)


def batches(file: Any, group: int, columns: Sequence[str], at_once: int) -> Iterator[Any]:
    """The record batches of a row group, of ``at_once`` rows, and of fewer where these take too much memory. Raises
    MemoryError where one row does."""
    done = 0
    for size, most in ((at_once, BATCH_BYTES), (max(1, at_once // 32), BATCH_BYTES), (1, ROW_BYTES)):
        found, skipped = file.iter_batches(size, [group], columns=list(columns), use_threads=False), 0
        while True:
            try:
                with memory_at_most(most):
                    batch = next(found, None)
            except MemoryError:
                if most == ROW_BYTES:
                    raise
                break
            if batch is None:
                return
            behind = batch.slice(min(batch.num_rows, done - skipped))
            skipped += batch.num_rows - behind.num_rows
            if behind.num_rows:
                done += behind.num_rows
                skipped = done
                yield behind


def values(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a batch as Python objects. Raises MemoryError where one is too large."""
    start, size = 0, ROWS_AT_ONCE
    while start < batch.num_rows:
        try:
            with memory_at_most(OBJECT_BYTES):
                rows = batch.slice(start, size).to_pylist()
        except MemoryError:
            if size == 1:
                most = f"{OBJECT_BYTES >> 20} MiB"
                raise MemoryError(f"the fields of a row take more than {most} of memory; leave them out") from None
            size = max(1, size // 16)
            continue
        start += size
        yield from rows
        del rows


def open_arrow(path: str) -> list[Any]:
    """The record batches of an Arrow stream, which stay on disk; nothing in them points outside of it."""
    import pyarrow

    found: list[Any] = []
    with pyarrow.memory_map(path) as file:
        before = pyarrow.total_allocated_bytes()
        stream = None
        while True:
            try:
                with memory_at_most(BATCH_BYTES):
                    stream = stream or pyarrow.ipc.open_stream(file)
                    batch = next(stream, None)
                if pyarrow.total_allocated_bytes() - before > OWN_BYTES:
                    raise MemoryError
            except MemoryError:
                raise ValueError(f"{path} is compressed; save it anew, as save_to_disk of datasets does") from None
            if batch is None:
                return found
            batch.validate(full=True)
            found.append(batch)


class Cells:
    """A column of bytes in a row group. Rows are read in order; the last ones are kept."""

    def __init__(self, read: Callable[[], Iterator[Any]]) -> None:
        """``read``: the record batches of this column."""
        self._read = read
        self._restart()

    def _restart(self) -> None:
        self._batches, self._kept = self._read(), deque[Any]()
        self._start = self._end = self._bytes = 0  # the kept rows, and their size
        self._error: Exception | None = None

    def __getitem__(self, row: int) -> Any:
        """A scalar."""
        if row < self._start:
            self._restart()
        while row >= self._end:
            self._advance()
        end = self._end
        for batch in reversed(self._kept):
            end -= batch.num_rows
            if row >= end:
                return batch.column(0)[row - end]
        raise IndexError(row)

    def _advance(self) -> None:
        import pyarrow

        if self._error is not None:
            raise self._error
        try:
            batch = next(self._batches, None)
        except (MemoryError, OSError, pyarrow.ArrowException) as error:
            self._error = error  # of all rows that follow, too
            raise
        if batch is None:
            raise IndexError(f"it has only {self._end} rows in a row group")
        self._kept.append(batch)
        self._end += batch.num_rows
        self._bytes += batch.nbytes
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            oldest = self._kept.popleft()
            self._start += oldest.num_rows
            self._bytes -= oldest.nbytes


def reason(error: Exception) -> str:
    """Why a file cannot be read, on one line."""
    if isinstance(error, MemoryError) and not (type(error) is MemoryError and error.args):
        most = f"{ROW_BYTES >> 20:,} MiB"
        return f"a row, or the pages in which it lies, takes more than {most} of memory; write smaller pages"
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


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
