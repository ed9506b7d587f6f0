"""What a store of files answers (``local.py``, ``http.py``, ``buckets.py``), and the error of a file that changed."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, field
from typing import Protocol

from mmmoe_pretrain.urls import StorageError, redacted

UNKNOWN = -1  # size of a file whose server does not say it


class OutsideError(StorageError):
    """The bytes are not those of the file as it was first seen."""


class ChangedError(OutsideError):
    """A file is no longer the one that was opened."""


@dataclass(frozen=True)
class Stat:
    """Bytes of a file, and what changes with its content: an ETag, or mtime in ns + size; "" where unknown."""

    size: int
    version: str = ""
    ranges: bool = field(default=True, compare=False)  # False: it can only be read from its beginning

    @property
    def seekable(self) -> bool:
        """Any range of it can be asked for."""
        return self.ranges and self.size != UNKNOWN


class Store(Protocol):
    """Files by URL. Every method raises TransientError where another try may help, MissingError where there is no
    such file, else StorageError; none takes much longer than ``seconds``. Used by several threads."""

    def stat(self, url: str, seconds: float) -> Stat:
        """Of one file."""

    def get(self, url: str, start: int, size: int, expected: Stat, seconds: float) -> bytes:
        """Exactly ``size`` bytes of the file as it was when ``expected`` was its stat."""

    def list(self, url: str, seconds: float) -> list[str]:
        """Names in a folder, sorted; those of folders end with /."""

    def close(self) -> None:
        """Give up descriptors and connections."""


def in_data_worker() -> bool:
    """Whether this process is one; alone of a run's processes it may have no children."""
    return multiprocessing.current_process().daemon


def check_same(url: str, expected: Stat, found: Stat) -> None:
    """Raise the error that says what is different, if anything is."""
    if found.version != expected.version or len({found.size, expected.size} - {UNKNOWN}) > 1:
        raise changed(url, expected, found)


def changed(url: str, expected: Stat, found: Stat) -> ChangedError:
    """The error that says what is different."""
    if found.size not in (expected.size, UNKNOWN):
        what = f"it has {found.size:,} bytes now, and had {expected.size:,}"
    else:
        what = "its time or ETag is another"
    return ChangedError(
        f"{redacted(url)} was changed while it was read: {what}; restore it and resume, or resume with the new one, "
        f"where the start names what to remove"
    )
