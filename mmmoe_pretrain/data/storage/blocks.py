"""Fewer and larger range requests to remote files than there are reads.

``CachedBlocks``: whole blocks through the cache of the node. ``Windows``: without a cache, readahead that doubles
where a file is read sequentially. ``Neighbours``: for random reads without a cache, exactly the range, or whole
blocks where reads lie close together. Of what is read sequentially, the next part is prefetched. All buffers are LRU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

from mmmoe_pretrain.data.storage.cache import BlockCache
from mmmoe_pretrain.data.storage.retry import Later, TransientError
from mmmoe_pretrain.data.storage.stores import Stat
from mmmoe_pretrain.urls import StorageError, redacted

GAP = 1 << 20  # bytes; a read that begins at most so far after the end of the last one reads on
FIRST_AHEAD, MOST_AHEAD = 128 << 10, 8 << 20
IN_BACKGROUND = 1 << 20  # windows of this size on are fetched ahead of their use
MOST_HELD = 64 << 20  # bytes of all windows, and of all blocks
NEAR = 4 << 20  # bytes of a block that is kept in memory
WORTH = 4  # whole blocks pay where at least one byte in so many is used: a request takes as long as 1 to 4 MB
FORGET = 0.995  # of the bytes that did not pay, at each read of just what is asked
FILES_KNOWN = 4096
LATER = 2  # blocks that are fetched in the background at a time

Fetch = Callable[[str, int, int, Stat], bytes]  # URL, start, size, expected


@dataclass(frozen=True)
class _Window:
    """What was fetched last of a file."""

    start: int
    data: bytes
    read_to: int  # end of the last read
    ahead: int  # bytes of the next window
    coming: Later[bytes] | None = None  # those right after ``data``

    @property
    def end(self) -> int:
        return self.start + len(self.data)


class Windows:
    """Reads of one process without a cache: sequential ones with readahead, others by ``Neighbours``."""

    def __init__(self, fetch: Fetch, seconds: float) -> None:
        self._fetch, self._seconds, self._neighbours = fetch, seconds, Neighbours(fetch)
        self._windows = OrderedDict[str, _Window]()
        self._lock, self._held, self._filled = threading.Lock(), 0, 0

    def read(self, url: str, offset: int, size: int, stat: Stat) -> bytes:
        end = offset + size
        with self._lock:
            window = self._windows.get(url, _Window(0, b"", -1, 0))
        if window.start <= offset and end <= window.end:
            self._keep(url, replace(window, read_to=end))
            return window.data[offset - window.start : end - window.start]
        held = self._neighbours.held(url, offset, size)
        if held is not None:
            return held
        if not 0 <= offset - window.read_to <= GAP:
            self._keep(url, _Window(offset, b"", end, 0))
            return self._neighbours.read(url, offset, size, stat)
        room = MOST_HELD // (2 * max(1, self._filled))  # many files may be read in order at a time
        ahead = max(FIRST_AHEAD, min(MOST_AHEAD, room, 2 * window.ahead))
        data = window.data[offset - window.start :] if window.start <= offset < window.end else b""
        at = offset + len(data)
        if window.coming is not None and at == window.end:
            data += self._result(window.coming, url)
        if len(data) < size:
            at = offset + len(data)
            data += self._fetch(url, at, min(max(end - at, ahead), stat.size - at), stat)
        coming, next_start = None, offset + len(data)
        if ahead >= IN_BACKGROUND and next_start < stat.size:
            length = min(ahead, stat.size - next_start)
            coming = Later(lambda: self._fetch(url, next_start, length, stat))
        self._keep(url, _Window(offset, data, end, ahead, coming))
        return data[:size]

    def _result(self, coming: Later[bytes], url: str) -> bytes:
        try:
            return coming.result(self._seconds)
        except TransientError as error:
            raise StorageError(f"cannot read {redacted(url)}: {error}; check the service and the network") from None

    def _keep(self, url: str, window: _Window) -> None:
        with self._lock:
            self._count(self._windows.pop(url, None), -1)
            self._windows[url] = window
            self._count(window, 1)
            while len(self._windows) > 1 and (self._held > MOST_HELD or len(self._windows) > FILES_KNOWN):
                self._count(self._windows.popitem(last=False)[1], -1)

    def _count(self, window: _Window | None, sign: int) -> None:
        if window and window.data:
            self._held += sign * (len(window.data) + (window.ahead if window.coming else 0))
            self._filled += sign


class Neighbours:
    """Random reads: the second one of a block fetches the whole block, as long as that pays."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch, self._lock = fetch, threading.Lock()
        self._blocks = OrderedDict[tuple[str, int], bytes]()
        self._seen = OrderedDict[tuple[str, int], None]()  # of which something was read
        self._fetched = self._used = 0.0  # bytes of whole blocks

    def read(self, url: str, offset: int, size: int, stat: Stat) -> bytes:
        index, start = divmod(offset, NEAR)
        small = size <= NEAR // WORTH and start + size <= NEAR
        block = self._block(url, index, stat) if small else None
        return self._fetch(url, offset, size, stat) if block is None else block[start : start + size]

    def held(self, url: str, offset: int, size: int) -> bytes | None:
        """The bytes where they lie in blocks that were fetched."""
        first, start = divmod(offset, NEAR)
        keys = [(url, index) for index in range(first, -(-(offset + size) // NEAR))]
        with self._lock:
            if not all(key in self._blocks for key in keys):
                return None
            for key in keys:
                self._blocks.move_to_end(key)
            blocks = [self._blocks[key] for key in keys]
            self._used += size
        return b"".join(blocks)[start : start + size]

    def _block(self, url: str, index: int, stat: Stat) -> bytes | None:
        key = url, index
        with self._lock:
            seen, pays = key in self._seen, self._fetched < WORTH * self._used + MOST_HELD
            self._seen[key] = None
            while len(self._seen) > FILES_KNOWN:
                self._seen.popitem(last=False)
            if not (seen and pays):
                self._fetched *= FORGET
                return None
        data = self._fetch(url, index * NEAR, min(NEAR, stat.size - index * NEAR), stat)
        with self._lock:
            self._fetched += len(data)
            self._blocks[key] = data
            while len(self._blocks) * NEAR > MOST_HELD:
                self._blocks.popitem(last=False)
            if self._fetched > 4 * MOST_HELD:  # what was long ago counts less
                self._fetched, self._used = self._fetched / 2, self._used / 2
        return data


class CachedBlocks:
    """Reads through the cache of the node."""

    def __init__(self, fetch: Fetch, seconds: float, cache: BlockCache) -> None:
        self._fetch, self._seconds, self.cache = fetch, seconds, cache
        self._block = cache.settings.block_bytes  # size of one
        self._last = OrderedDict[str, int]()  # block of the last read by URL
        self._background = threading.Semaphore(LATER)

    def read(self, url: str, offset: int, size: int, stat: Stat) -> bytes:
        end, pieces = offset + size, []
        for at in range(offset - offset % self._block, end, self._block):
            pieces.append(self._piece(url, stat, at // self._block, max(offset - at, 0), min(end - at, self._block)))
        return b"".join(pieces)

    def _piece(self, url: str, stat: Stat, index: int, start: int, end: int) -> bytes:
        if self._last.get(url) == index - 1 and (index + 1) * self._block < stat.size:
            self._fetch_ahead(url, stat, index + 1)
        self._last[url] = index
        self._last.move_to_end(url)
        while len(self._last) > FILES_KNOWN:
            self._last.popitem(last=False)
        size = min(self._block, stat.size - index * self._block)
        data = self.cache.get(self.cache.name(url, stat, index), size, start, end)
        return self._fill(url, stat, index)[start:end] if data is None else data

    def _fill(self, url: str, stat: Stat, index: int) -> bytes:
        """Block ``index``: another process may be fetching it."""
        name, size = self.cache.name(url, stat, index), min(self._block, stat.size - index * self._block)
        with self.cache.filling(name, self._seconds):
            data = self.cache.get(name, size, 0, size)
            if data is None:
                data = self._fetch(url, index * self._block, size, stat)
                self.cache.put(name, data)
        return data

    def _fetch_ahead(self, url: str, stat: Stat, index: int) -> None:
        if not self._background.acquire(blocking=False):
            return

        def work() -> None:
            try:
                self._fill(url, stat, index)
            finally:
                self._background.release()

        Later(work)
