"""Local files by pread: a bounded number of open descriptors, and nothing that could block (a FIFO is refused)."""

from __future__ import annotations

import errno
import io
import os
import resource
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from mmmoe_pretrain.data.storage.retry import TransientError
from mmmoe_pretrain.data.storage.stores import Stat, changed, check_same
from mmmoe_pretrain.urls import MissingError, StorageError, local_path

MAX_OPEN = 256
SHARE_OF_DESCRIPTORS = 4  # at most one in so many of those that the process may have
PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO, errno.ECONNRESET}  # network disks
REMEDIES = {
    errno.ENOENT: "it does not exist; copy it there, or correct the path",
    errno.ENOTDIR: "a file is where a folder must be; correct the path",
    errno.EACCES: "no permission; change its owner or mode",
    errno.EPERM: "no permission; change its owner or mode",
    errno.ELOOP: "its symbolic links form a loop; correct them",
    errno.EMFILE: "too many open files; raise ulimit -n",
    errno.ENFILE: "too many open files on this machine; close some, or raise fs.file-max",
    errno.ENAMETOOLONG: "the name is too long; correct the path",
}


def descriptors(most: int, share: int) -> int:
    """``most``, or one in ``share`` of those that the process may have, where that is less; at least 1."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft // share))


class LocalFiles:
    """A store (``stores.Store``) of paths. May be used by several threads, and by forked processes."""

    def __init__(self) -> None:
        self._limit = descriptors(MAX_OPEN, SHARE_OF_DESCRIPTORS)
        # A file is closed when it is neither here nor in use. The least recently used stands first.
        self._open: OrderedDict[str, io.FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def stat(self, url: str, seconds: float) -> Stat:
        with _explained("read", url):
            return _plain(os.stat(local_path(url)), url)

    def get(self, url: str, start: int, size: int, expected: Stat, seconds: float) -> bytes:
        try:
            with _explained("read", url):
                file = self._file(url)
                data = os.pread(file.fileno(), size, start)
                while 0 < len(data) < size and (more := os.pread(file.fileno(), size - len(data), start + len(data))):
                    data += more  # one pread gives at most 2 GiB
                check_same(url, expected, _plain(os.fstat(file.fileno()), url))  # it may be overwritten in place
        except TransientError:  # a stale handle of a network disk stays stale: open it again
            with self._lock:
                self._open.pop(url, None)
            raise
        if len(data) != size:
            raise changed(url, expected, Stat(start + len(data)))
        return data

    def list(self, url: str, seconds: float) -> list[str]:
        with _explained("list", url), os.scandir(local_path(url) or ".") as entries:
            return sorted(entry.name + "/" * entry.is_dir() for entry in entries)

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _file(self, url: str) -> io.FileIO:
        with self._lock:
            if url in self._open:
                self._open.move_to_end(url)
                return self._open[url]
        # O_NONBLOCK: opening a FIFO would wait for a writer
        file = io.FileIO(os.open(local_path(url), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        _plain(os.fstat(file.fileno()), url)
        with self._lock:
            while len(self._open) >= self._limit:
                self._open.popitem(last=False)
            self._open[url] = file
        return file


def _plain(status: os.stat_result, url: str) -> Stat:
    if stat.S_ISDIR(status.st_mode):
        raise StorageError(f"cannot read {url}: it is a folder, not a file; correct the path")
    if not stat.S_ISREG(status.st_mode):  # a pipe would never end
        raise StorageError(f"cannot read {url}: it is not a plain file; put the file itself there")
    return Stat(status.st_size, f"{status.st_mtime_ns}+{status.st_size}")


@contextmanager
def _explained(doing: str, url: str) -> Iterator[None]:
    """Errors of the system as a StorageError with the remedy, or a TransientError."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno in PASSING:
            raise TransientError(error.strerror or str(error)) from None
        kind = MissingError if error.errno in (errno.ENOENT, errno.ENOTDIR) else StorageError
        remedy = REMEDIES.get(error.errno or 0, f"{error.strerror or error}; check the disk")
        raise kind(f"cannot {doing} {url}: {remedy}") from error
