"""What happened to a run: one JSON line an event in ``RUN/events.jsonl``, kept over all its starts.

Only rank 0 writes. Steps and losses are in ``metrics.jsonl``; this is the record of everything out of the
ordinary, and of starts and saves. Lines are appended and never changed.
"""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

EVENTS = "events.jsonl"


class Journal:
    """``write("saved", step=100, path=...)``; where it is not ``enabled`` it writes nothing."""

    def __init__(self, run_dir: Path, enabled: bool = True) -> None:
        self._file = None
        if enabled:
            run_dir.mkdir(parents=True, exist_ok=True)
            path = run_dir / EVENTS
            torn = _lacks_end(path)
            self._file = path.open("a", encoding="utf-8")
            if torn:  # by a crash; the next line must not run into it
                self._file.write("\n")

    def write(self, event: str, **facts: Any) -> None:
        """Append an event, on the disk when this returns."""
        if self._file is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events, oldest first; lines that a crash tore are left out."""
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


def _lacks_end(path: Path) -> bool:
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"
