"""Small files of a run: the journal ``RUN/events.jsonl``, and how lines are appended and files replaced safely.

The journal has one JSON line an event (starts, saves, skipped steps, rollbacks, ...), over all starts; only rank 0
writes it. Losses and speed are in ``metrics.jsonl``. On a full disk lines are lost and the run continues.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
EVENTS = "events.jsonl"


class LineWriter:
    """``write`` appends a whole line or nothing, and never raises an OSError: the first in a row is logged.

    ``sync``: a line is on the disk when ``write`` returns.
    """

    def __init__(self, path: Path, sync: bool = False) -> None:
        self._path, self._sync = path, sync
        self._file: FileIO | None = None
        self._failing = False

    def write(self, line: str) -> None:
        try:
            if self._file is None:
                self._file = _open(self._path)
            self._append(self._file.fileno(), f"{line}\n".encode())
        except OSError as error:
            if not self._failing:
                log.error("cannot write %s: %s; training continues, and these lines are lost", self._path, error)
            self._failing = True
        else:
            self._failing = False

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
                os.ftruncate(file, end)  # no half of a line before the next one
            raise


class Journal:
    """``write("saved", step=100, path=...)``; where it is not ``enabled`` it writes nothing."""

    def __init__(self, run_dir: Path, enabled: bool = True) -> None:
        self._lines = LineWriter(run_dir / EVENTS, sync=True) if enabled else None

    def write(self, event: str, **facts: Any) -> None:
        """Append an event, which is on the disk when this returns."""
        if self._lines is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
        self._lines.write(json.dumps(line, separators=(",", ":")))

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first; half-written lines of a crash are skipped."""
    path = run_dir / EVENTS
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and "event" in event:
            found.append(event)
    return found


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary file that replaces ``path`` after the ``with``: a crash leaves the old file or the new
    one."""
    draft = path.with_name(path.name + ".tmp")
    yield draft
    with draft.open("rb+") as file:
        os.fsync(file.fileno())  # else the new name may be on the disk before the content
    os.replace(draft, path)


def _open(path: Path) -> FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    incomplete = _lacks_end(path)
    file = path.open("ab", buffering=0)
    if incomplete:  # by a crash
        file.write(b"\n")
    return file


def _lacks_end(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
