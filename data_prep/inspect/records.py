"""What became of each row when shards were written, by the Parquet files beside them (``shards/records.py``).

Those of img2dataset are read, too: their reasons are in ``error_message``.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmmoe_pretrain.data.storage.files import Files, MissingError
from mmmoe_pretrain.data_prep.rows.columnar import ROWS_AT_ONCE, batches, parquet_file, reason, values
from mmmoe_pretrain.limits import MAX_MEMBER_BYTES
from mmmoe_pretrain.progress import track
from mmmoe_pretrain.urls import StorageError, redacted

MOST_REASONS = 1000
OTHER = "other reasons"
MAX_LETTERS = 300
_REASONS = ("reason", "error_message")


@dataclass(slots=True)
class Records:
    """Numbers of rows by status, and by the reason where they have one. ``unreadable``: files."""

    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)

    def line(self) -> str:
        statuses = ", ".join(f"{status} {count:,}" for status, count in self.statuses.most_common())
        broken = f"; cannot be read: {', '.join(self.unreadable[:3])}" if self.unreadable else ""
        return f"records: {statuses or 'none'}{broken}"

    def to_json(self) -> dict[str, Any]:
        return {
            "statuses": dict(self.statuses),
            "reasons": dict(self.reasons.most_common()),
            "unreadable": self.unreadable,
        }

    def add(self, data: bytes) -> None:
        """Of a Parquet file. Raises pyarrow's errors."""
        with parquet_file(io.BytesIO(data)) as file:
            names = set(file.schema_arrow.names)
            why = next((name for name in _REASONS if name in names), None)
            columns = [name for name in ("status", why) if name in names and name]
            if "status" not in columns:
                return
            for batch in (
                each for group in range(file.num_row_groups) for each in batches(file, group, columns, ROWS_AT_ONCE)
            ):
                for row in values(batch):
                    self._count(self.statuses, str(row["status"]))
                    if why and row[why]:
                        self._count(self.reasons, str(row[why]))

    def _count(self, counts: Counter[str], value: str) -> None:
        value = value[:MAX_LETTERS]
        counts[value if value in counts or len(counts) < MOST_REASONS else OTHER] += 1


def read_records(urls: Sequence[str], files: Files) -> Records | None:
    """Of the files beside these shards; None where the first shard has none."""
    from pyarrow import ArrowException

    found = Records()
    for number, url in enumerate(track(urls, "reading records", len(urls), "shards")):
        path, mark, query = url.partition("?")
        path = f"{path.removesuffix('.tar')}.parquet{mark}{query}"
        try:
            found.add(files.read_all(path, MAX_MEMBER_BYTES))
        except MissingError:
            if not number:
                return None
        except (StorageError, ArrowException, MemoryError, ValueError, OSError) as error:
            found.unreadable.append(f"{redacted(path)} ({reason(error)})")
    return found
