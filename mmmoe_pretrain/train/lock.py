"""The lock of a run: two jobs that train the same run would delete each other's checkpoints.

It is a POSIX record lock, which belongs to the process: it is released when the process ends, and forked processes do
not inherit it, so a data worker that hangs does not block the next start. It also ends when this process closes the
file anywhere, so nothing else opens it. The file names its holder by host, process and start time, for messages and
for file systems that have no locks.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import struct
import time
from io import FileIO
from pathlib import Path
from typing import Self

from mmmoe_pretrain.exit_codes import Restartable

log = logging.getLogger(__name__)
LOCK = "lock"
WAIT = 10.0  # seconds: of an earlier start of this job that is ending
BUSY = (errno.EAGAIN, errno.EACCES)
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # to this file system
FLOCK = "hhqqi"  # of a 64-bit Linux: type, whence, start, length, process
HOLDER = re.compile(r"process (\d+) on (\S+), started at (\d+)")


class RunLock:
    """RUN/lock, held from ``take`` to the end of a ``with`` or of this process."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.holder = ""  # this process, once it has the lock
        self._path = run_dir / LOCK
        self._file: FileIO | None = None

    def take(self, wait: float = WAIT) -> bool:
        """Whether another process had it when this one started. Makes the run's folder if there is none. Does nothing
        if this process has it already.

        Raises Restartable, naming the other process, where it still has it after ``wait`` seconds.
        Raises OSError where the folder cannot be written.
        """
        if self._file is not None:
            return False
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("ab+", buffering=0)
        deadline, waited = time.monotonic() + wait, False
        try:
            while not self._locked(file):
                if time.monotonic() > deadline:
                    raise Restartable(self._taken(wait))
                waited = True
                time.sleep(0.1)
            file.truncate(0)
            pid = os.getpid()
            self.holder = f"process {pid} on {socket.gethostname()}, started at {_start(pid)}"
            file.write(f"{self.holder}\n".encode())
        except BaseException:
            file.close()
            raise
        self._file = file
        return waited

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
        self._file = None

    def seen(self) -> str:
        """What another process's file says; empty where there is none. The holder would lose the lock by it."""
        assert self._file is None
        try:
            return self._text()
        except OSError:
            return ""

    def _locked(self, file: FileIO) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNKNOWN:
                return not self._holder_lives()
            if error.errno not in BUSY:
                raise
            return False
        return True

    def _holder_lives(self) -> bool:
        """Without locks: whether the file names another process that runs. One of another host counts as ended."""
        found = HOLDER.match(self._text())
        if found is None or found[2] != socket.gethostname():
            message = "no locks where %s is (it names %s): train one job at a time there"
            log.warning(message, self._path, self._text() or "no process")
            return False
        pid, start = int(found[1]), int(found[3])
        return pid != os.getpid() and 0 < start == _start(pid)

    def _text(self) -> str:
        return self._path.read_text(encoding="utf-8", errors="replace").strip()[:200]

    def _taken(self, wait: float) -> str:
        holder = self._text().partition(", started")[0] or "another process"
        return (
            f"{self._path.parent} is being trained by {holder} (waited {wait:g} s); "
            f"start again when that has ended, end it, or give this run another name=. If its machine failed and "
            f"the file system does not notice, delete {self._path}"
        )


def holder_of(run_dir: Path) -> tuple[bool | None, str]:
    """Whether another process trains the run (None: a file system that does not tell, and another host), and what its
    file says of the last one. Takes no lock. Not for the process that holds it, which would lose it by this."""
    try:
        with (run_dir / LOCK).open("rb") as file:
            text = file.read(200).decode(errors="replace").strip()
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            try:
                answer = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            except OSError:
                found = HOLDER.match(text)
                here = found is not None and found[2] == socket.gethostname()
                return (0 < int(found[3]) == _start(int(found[1])) if found and here else None), text
    except OSError:
        return False, ""
    return answer[0] != fcntl.F_UNLCK, text


def _start(pid: int) -> int:
    """When the process began, in clock ticks since its machine did; 0 where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    state, *rest = stat.rpartition(")")[2].split()
    return 0 if state in "ZX" else int(rest[18])
