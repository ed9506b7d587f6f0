"""Lines at the end of a file that a run can do without: a disk that is full costs lines, and not the run."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path

log = logging.getLogger(__name__)


class Lines:
    """``write`` appends a whole line or nothing, and never raises an OSError: the first of a series is logged.

    ``sync``: a line is on the disk when ``write`` returns.
    """

    def __init__(self, path: Path, sync: bool = False) -> None:
        self._path, self._sync = path, sync
        self._file: FileIO | None = None
        self._told = False

    def write(self, line: str) -> None:
        try:
            if self._file is None:
                self._file = _open(self._path)
            self._append(self._file.fileno(), f"{line}\n".encode())
        except OSError as error:
            if not self._told:
                log.error("cannot write %s: %s; the run goes on, and what it says there is lost", self._path, error)
            self._told = True
        else:
            self._told = False

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()

    def _append(self, file: int, line: bytes) -> None:
        end, rest = os.fstat(file).st_size, memoryview(line)
        try:
            while rest:
                rest = rest[os.write(file, rest) :]
            if self._sync:
                os.fsync(file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, end)  # the next line must not run into half of this one
            raise


def _open(path: Path) -> FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = _lacks_end(path)
    file = path.open("ab", buffering=0)
    if torn:  # by a crash
        file.write(b"\n")
    return file


def _lacks_end(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
