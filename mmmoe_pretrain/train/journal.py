"""What happened to a run: one JSON line an event in ``RUN/events.jsonl``, kept over all its starts.

Only rank 0 writes. Steps and losses are in ``metrics.jsonl``; this is the record of everything out of the
ordinary, and of starts and saves. Lines are appended and never changed.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmmoe_pretrain.train.lines import Lines

EVENTS = "events.jsonl"


class Journal:
    """``write("saved", step=100, path=...)``; where it is not ``enabled`` it writes nothing."""

    def __init__(self, run_dir: Path, enabled: bool = True) -> None:
        self._lines = Lines(run_dir / EVENTS, sync=True) if enabled else None

    def write(self, event: str, **facts: Any) -> None:
        """Append an event, on the disk when this returns; a disk that fails costs the event."""
        if self._lines is None:
            return
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
        self._lines.write(json.dumps(line, separators=(",", ":")))

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

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
