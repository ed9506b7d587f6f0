"""Blocks of remote files on a local disk, shared by the processes of a node, with a bound on their size.

A block is one file, named by the hash of (URL, version, place), written under another name and renamed, with a
checksum at its end. Locks are the kernel's (flock): they end with their process, and nobody waits for one without a
limit. The bound may be exceeded by a block for each process that writes one. A cache that cannot be written is left
alone for a while; a damaged block is fetched again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import random
import secrets
import struct
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import xxhash

from mmmoe_pretrain.data.storage.stores import Stat
from mmmoe_pretrain.urls import has_secret, redacted

logger = logging.getLogger(__name__)
CHECKSUM = 16  # bytes at the end of a block's file
TOUCH_SECONDS = 60.0  # the time of last use is as exact as this
DRAFT_SECONDS = 3600.0  # an older draft is of a process that ended
LEFT_ALONE_SECONDS = 300.0  # after an error of its disk
TOTAL_SECONDS = 5.0  # of waiting for the lock of the total
KEEP = 0.9  # of the bound is left by an eviction
_TOTAL = struct.Struct("<q")


@dataclass(frozen=True)
class CacheSettings:
    """``folder`` should be on a disk of the node."""

    folder: str
    most_bytes: int = 100 * 10**9
    block_bytes: int = 8 << 20


class BlockCache:
    """The cache in one folder, as one process sees it."""

    def __init__(self, settings: CacheSettings) -> None:
        self.settings, self.folder = settings, Path(settings.folder) / "blocks-v1"
        self._checked = OrderedDict[tuple[str, int], None]()  # blocks (name, inode) with a right checksum
        self._off_until, self._told = 0.0, False

    @property
    def usable(self) -> bool:
        return time.monotonic() >= self._off_until

    def name(self, url: str, stat: Stat, index: int) -> str:
        """Of block ``index`` of a file, whoever signs its URL."""
        place = redacted(url.partition("?")[0] if has_secret(url) else url)
        parts = (place, stat.version, str(stat.size), str(self.settings.block_bytes), str(index))
        return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())

    def get(self, name: str, size: int, start: int, end: int) -> bytes | None:
        """Bytes ``start`` to ``end`` of the block of ``size`` bytes; None where it is not there."""
        path = self._path(name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return self._read(descriptor, path, size, start, end)
        except OSError as error:
            self._leave_alone(error)
            return None
        finally:
            os.close(descriptor)

    def put(self, name: str, data: bytes) -> None:
        """Keep a block; the least recently used ones make room."""
        path, draft = self._path(name), self.folder / "drafts" / f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.parent.mkdir(exist_ok=True)
            self._reserve(len(data) + CHECKSUM)
            with draft.open("wb", buffering=0) as file:
                for part in (data, xxhash.xxh3_128_digest(data)):
                    view = memoryview(part)
                    while view:
                        view = view[file.write(view) :]
            draft.replace(path)
        except FileNotFoundError as error:
            with suppress(OSError):  # somebody removed it meanwhile, and the next block makes it anew
                self.folder.mkdir(parents=True, exist_ok=True)
                return
            self._leave_alone(error)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            self._leave_alone(error)

    def filling(self, name: str, seconds: float) -> AbstractContextManager[bool]:
        """Others who want this block wait until it is there, at most ``seconds``."""
        return self._locked(self.folder / "locks" / name[:2], seconds)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _read(self, descriptor: int, path: Path, size: int, start: int, end: int) -> bytes | None:
        status = os.fstat(descriptor)
        if time.time() - status.st_mtime > TOUCH_SECONDS:
            with suppress(FileNotFoundError):
                os.utime(path)
        key = path.name, status.st_ino
        if status.st_size == size + CHECKSUM and key in self._checked:
            data = os.pread(descriptor, end - start, start)
            if len(data) == end - start:
                return data
        whole = os.pread(descriptor, size + CHECKSUM + 1, 0)
        if len(whole) != size + CHECKSUM or xxhash.xxh3_128_digest(whole[:size]) != whole[size:]:
            logger.warning("the cached block %s is damaged; it is fetched again", path)
            path.unlink(missing_ok=True)
            return None
        self._checked[key] = None
        while len(self._checked) > 10_000:
            self._checked.popitem(last=False)
        return whole[start:end]

    def _leave_alone(self, error: OSError) -> None:
        self._off_until = time.monotonic() + LEFT_ALONE_SECONDS
        if not self._told:
            logger.warning(
                "the cache in %s is not used for now (%s); reading goes on without it, slower. Make room, lower "
                "data.cache.size_gb, or correct data.cache.folder", self.settings.folder, error.strerror or error,
            )  # fmt: skip
        self._told = True

    def _reserve(self, size: int) -> None:
        """Count ``size`` more bytes, and make room for them."""
        with self._locked(self.folder / "lock", TOTAL_SECONDS):
            descriptor = os.open(self.folder / "total", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                stored = os.pread(descriptor, _TOTAL.size, 0)
                total = _TOTAL.unpack(stored)[0] if len(stored) == _TOTAL.size else -1
                total = size + (self._evict(1 << 62) if total < 0 else total)
                if total > self.settings.most_bytes:
                    total = self._evict(int(KEEP * self.settings.most_bytes) - size) + size
                os.pwrite(descriptor, _TOTAL.pack(total), 0)
            finally:
                os.close(descriptor)

    def _evict(self, most: int) -> int:
        """Remove the least recently used blocks until at most ``most`` bytes are left; how many are."""
        found, now = [], time.time()
        for path in (*self.folder.glob("??/*"), *self.folder.glob("drafts/*")):
            with suppress(FileNotFoundError):  # another process removed it
                status = path.stat()
                if path.parent.name != "drafts":
                    found.append((status.st_mtime_ns, status.st_size, path))
                elif now - status.st_mtime > DRAFT_SECONDS:
                    path.unlink()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= most:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    @contextmanager
    def _locked(self, path: Path, seconds: float) -> Iterator[bool]:
        """With the lock of ``path``, or without it after ``seconds`` or where the disk has no locks."""
        descriptor, held, deadline = -1, False, time.monotonic() + seconds
        try:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                while not held:
                    try:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        held = True
                    except BlockingIOError:
                        if time.monotonic() >= deadline:
                            break
                        time.sleep(random.SystemRandom().uniform(0.002, 0.02))
            yield held
        finally:
            if held:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a fork made meanwhile may hold the descriptor, too
            if descriptor >= 0:
                os.close(descriptor)
