"""Bytes of files anywhere, by path or URL: what every reader of shards uses.

One ``Files`` a process, shared by its sources. It owns retries, time limits, readahead and the cache; how a store
answers a range request is in ``local.py``, ``http.py`` and ``buckets.py``. A file is checked to stay the same from
its first use on.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.storage.blocks import CachedBlocks, Windows
from mmmoe_pretrain.data.storage.buckets import FsspecFiles, ObstoreFiles, obstore_reads
from mmmoe_pretrain.data.storage.cache import BlockCache, CacheSettings
from mmmoe_pretrain.data.storage.http import HttpFiles
from mmmoe_pretrain.data.storage.local import LocalFiles
from mmmoe_pretrain.data.storage.retry import Retries, TransientError
from mmmoe_pretrain.data.storage.stores import ChangedError, OutsideError, Stat, Store
from mmmoe_pretrain.urls import MissingError, StorageError, filled_in, options_filled_in, protocol, redacted

__all__ = ["CacheSettings", "Files", "MissingError", "ReadSettings", "Stat", "StorageError", "read_settings"]
STREAM_CHUNK = 1 << 20
WAIT_SHARE = 0.2  # of the limit of a read: for a block that another process is fetching
T = TypeVar("T")


@dataclass(frozen=True)
class ReadSettings:
    """How files are read. ``options``: of fsspec, by protocol or by the beginning of a URL (the longest one counts);
    ``cache``: of remote files."""

    retries: Retries = field(default_factory=Retries)
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cache: CacheSettings | None = None

    def options_of(self, url: str) -> tuple[str, Mapping[str, Any]]:
        """The key in ``options`` that counts for ``url``, and its value."""
        keys = [key for key in self.options if key == protocol(url) or ("://" in key and url.startswith(key))]
        key = max(keys, key=len, default=protocol(url))
        return key, self.options.get(key, {})


def read_settings(config: RunConfig) -> ReadSettings:
    """Of the training data of a run."""
    data, cache = config.data, None
    if data.cache:
        cache = CacheSettings(data.cache.folder, int(data.cache.size_gb * 1e9), data.cache.block_mb << 20)
    return ReadSettings(
        Retries(min(data.request_timeout, config.read_seconds), config.read_seconds, data.read_retries),
        data.storage_options,
        cache,
    )


class _Process:
    """Connections, descriptors and threads, which are not shared with a fork."""

    def __init__(self, files: Files, before: _Process | None) -> None:
        self.pid = os.getpid()
        # Kept: a worker closes the sockets of its rank, and destroying these would close what has their numbers now.
        self._before = before
        self.local = LocalFiles()
        self.stores: dict[str, Store] = {}
        seconds, cache = files.settings.retries.read_seconds, files.settings.cache
        self.windows = Windows(files.fetch, seconds)
        self.blocks = CachedBlocks(files.fetch, WAIT_SHARE * seconds, BlockCache(cache)) if cache else None


class Files:
    """Files by path, ``file://`` or any other URL. ``$VAR`` in a URL is filled in when it is opened.

    Safe to use from threads and after a fork. Raises StorageError, in one line with the URL and the remedy:
    MissingError where there is no such file.
    """

    def __init__(self, settings: ReadSettings | None = None) -> None:
        self.settings = settings or ReadSettings()
        self._retried = self.settings.retries.run
        self._stats: dict[str, Stat] = {}
        self._confirmed: set[str] = set()  # URLs whose stat agreed with a read, or is given
        self._process: _Process | None = None

    def __reduce__(self) -> tuple[type[Files], tuple[ReadSettings]]:
        return Files, (self.settings,)

    def stat(self, url: str) -> Stat:
        """Size and version now."""
        return self._retried(lambda seconds: self._store(url).stat(filled_in(url), seconds), f"read {url}")

    def expect(self, url: str, stat: Stat) -> None:
        """Reads of ``url`` must find this version of it; without, the first read decides."""
        self._stats[url] = stat
        self._confirmed.add(url)

    def list(self, folder: str) -> list[str]:
        """Names in a folder, sorted; those of folders end with /."""
        return self._retried(lambda seconds: self._store(folder).list(filled_in(folder), seconds), f"list {folder}")

    def read(self, url: str, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset`` on."""
        try:
            data = self._read(url, offset, size)
        except OutsideError:
            if url in self._confirmed:
                raise
            self._stats[url] = self.stat(url)  # the first answer may have been the wrong one
            data = self._read(url, offset, size)
        self._confirmed.add(url)
        return data

    def _read(self, url: str, offset: int, size: int) -> bytes:
        own, expected = self._own, self._expected(url)
        if offset < 0 or size < 0 or 0 <= expected.size < offset + size:
            raise OutsideError(
                f"cannot read bytes {offset:,} to {offset + size:,} of {redacted(url)}, which has {expected.size:,}: "
                f"it is truncated, or its index is of another file; copy it again, or index it again"
            )
        if not size:
            return b""
        if self._store(url) is own.local:
            return self.fetch(url, offset, size, expected)
        if own.blocks and own.blocks.cache.usable and expected.version and expected.size >= 0:
            return own.blocks.read(url, offset, size, expected)
        if not expected.seekable:
            return self.fetch(url, offset, size, expected)
        return own.windows.read(url, offset, size, expected)

    def read_all(self, url: str, most: int) -> bytes:
        """A whole file of at most ``most`` bytes."""
        expected = self._expected(url)
        if expected.seekable:
            data = self.read(url, 0, expected.size) if expected.size <= most else None
        else:
            data = self.stream(url).read(most + 1)
        if data is None or len(data) > most:
            raise StorageError(f"{redacted(url)} has more than {most:,} bytes, and at most so many are read")
        return data

    def download(self, url: str, most: int, seconds: float = 20.0) -> bytes:
        """A file of at most ``most`` bytes that is read once: not retried, and nothing of it is kept. For URLs that
        the user did not write: no variable is filled in. Raises as a store does."""
        store = self._store_of(url)
        found = store.stat(url, seconds)
        if not 0 <= found.size <= most:
            raise StorageError(f"{redacted(url)} has {found.size:,} bytes, and at most {most:,} are read")
        return store.get(url, 0, found.size, found, seconds) if found.size else b""

    def stream(self, url: str, offset: int = 0) -> BinaryIO:
        """The file from ``offset`` on, to be read once and in order; from a server without ranges, too."""
        expected = self._expected(url)
        chunks = self._ranges(url, offset) if expected.seekable else self._chunks(url, offset, expected)
        return io.BufferedReader(_ChunkReader(chunks), STREAM_CHUNK)

    def close(self) -> None:
        """Give up descriptors and connections; the next call opens new ones."""
        own = self._own
        for store in (own.local, *own.stores.values()):
            store.close()
        own.stores.clear()

    def fetch(self, url: str, start: int, size: int, expected: Stat) -> bytes:
        """One request, retried; past buffers and cache."""

        def attempt(seconds: float) -> bytes:
            store = self._store(url)
            try:
                return store.get(filled_in(url), start, size, expected, seconds)
            except ChangedError as error:
                if store.stat(filled_in(url), seconds) != expected:
                    raise
                raise TransientError(str(error)) from None  # one wrong answer is no change

        return self._retried(attempt, f"read {url}")

    def _ranges(self, url: str, offset: int) -> Iterator[bytes]:
        while offset < (expected := self._expected(url)).size:
            try:
                data = self.read(url, offset, min(STREAM_CHUNK, expected.size - offset))
            except OutsideError:
                if self._expected(url) == expected:
                    raise
                continue  # its size is known better now
            yield data
            offset += len(data)

    def _chunks(self, url: str, offset: int, expected: Stat) -> Iterator[bytes]:
        """Chunks of one answer; after an error the next answer is skipped up to where it was."""
        chunks: Iterator[bytes] | None = None

        def attempt(seconds: float) -> bytes:
            nonlocal chunks
            try:
                if chunks is None:
                    store = self._store(url)
                    assert isinstance(store, HttpFiles | FsspecFiles), f"{redacted(url)} has no size"
                    chunks = store.chunks(filled_in(url), offset, seconds)
                return next(chunks, b"")
            except TransientError:
                chunks = None
                raise

        while data := self._retried(attempt, f"read {url}"):
            yield data
            offset += len(data)
        if 0 <= expected.size != offset:
            raise StorageError(
                f"{redacted(url)} ended after {offset:,} bytes, and has {expected.size:,}: it was changed while it "
                f"was read; restore it, and resume"
            )

    @property
    def _own(self) -> _Process:
        own = self._process
        if own is None or own.pid != os.getpid():
            own = self._process = _Process(self, own)
        return own

    def _expected(self, url: str) -> Stat:
        if url not in self._stats:
            self._stats[url] = self.stat(url)
        return self._stats[url]

    def _store(self, url: str) -> Store:
        return self._store_of(filled_in(url))

    def _store_of(self, full: str) -> Store:
        own, name = self._own, protocol(full)
        if name == "file":
            return own.local
        key, given = self.settings.options_of(full)
        if key not in own.stores:
            options = options_filled_in(given)
            if name in ("http", "https"):
                own.stores[key] = HttpFiles(options)
            elif obstore_reads(name, options):
                own.stores[key] = ObstoreFiles(options)
            else:
                own.stores[key] = FsspecFiles(name, options)
        return own.stores[key]


class _ChunkReader(io.RawIOBase):
    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._rest = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size
