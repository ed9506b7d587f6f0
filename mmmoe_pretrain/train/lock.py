"""One job at a time trains a run: two would delete each other's drafts and checkpoints."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from io import FileIO
from pathlib import Path
from typing import Self

log = logging.getLogger(__name__)
LOCK = "lock"
WAIT = 10.0  # seconds: of an earlier start of this job that is ending, and its data workers with it
BUSY = (errno.EAGAIN, errno.EACCES)
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # to this file system


class RunLock:
    """RUN/lock, held from ``take`` to the end of a ``with`` or of this process, however it ends."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LOCK
        self._file: FileIO | None = None

    def take(self, wait: float = WAIT) -> bool:
        """Did another process have it when this one came? Makes the run's folder if there is none. Nothing happens
        where this process has it already.

        Raises ValueError, naming the other process, where it still has it after ``wait`` seconds, and OSError where
        the folder cannot be written.
        """
        if self._file is not None:
            return False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("ab+", buffering=0)
        try:
            waited = self._locked(file, time.monotonic() + wait)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BaseException:
            file.close()
            raise
        self._file = file
        return waited

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _locked(self, file: FileIO, deadline: float) -> bool:
        waited = False
        while True:
            try:
                # It belongs to the open file: forked data workers hold it, too, for the moment that they outlive
                # their rank.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in UNKNOWN:
                    log.warning("no locks where %s is: see that one job at a time trains there", self._path)
                    return waited
                if error.errno not in BUSY:
                    raise
                if time.monotonic() > deadline:
                    raise ValueError(self._taken()) from None
                waited = True
                time.sleep(0.1)
            else:
                return waited

    def _taken(self) -> str:
        holder = self._path.read_text(encoding="utf-8", errors="replace").strip()[:200] or "another process"
        return (
            f"{self._path.parent} is being trained by {holder}; wait until that has ended, end it, or give this run "
            f"another name="
        )
