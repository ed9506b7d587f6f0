"""What became of each row: a Parquet file of records beside each shard, and what they sum up to.

A record has the fields of RECORD; one that does not apply to a row is null. Records are only read here, so that
memory does not grow with them.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmmoe_pretrain.data_prep.quality.filters import rule_of

OK, BROKEN, FILTERED = "ok", "broken", "filtered"
# Field -> its type in pyarrow's spelling.
RECORD = {
    "key": "string", "status": "string", "reason": "string", "retry": "bool_", "content": "string",
    "language": "string", "label": "string", "group": "string", "licence": "string", "source": "string",
    "bytes": "int64", "text_characters": "int64", "blank_texts": "int64", "width": "int64", "height": "int64",
    "seconds": "float64", "sample_rate": "int64", "image_xxh3": "string", "audio_xxh3": "string",
    "text_xxh3": "string",
}  # fmt: skip
SKIPPED = ("key", "status", "reason", "retry")  # what is told of rows without a sample
COUNTED = ("content", "language", "licence", "source")  # by value
SUMMED = ("bytes", "seconds", "text_characters", "blank_texts")
BATCH = 10_000  # records in memory that are read
ROW_GROUP = 50_000  # records in memory that are written: more than a shard has, unless filters leave out most rows


class RecordWriter:
    """Writes records to ``NAME.tmp``, which takes its name at the end. ``after``: records of an earlier command under
    the same name; those of other rows stay, behind the new ones."""

    def __init__(self, path: Path, after: Path | None = None) -> None:
        self.count = 0
        self._path, self._partial = path, path.with_name(path.name + ".tmp")
        self._after = after if after is not None and after.exists() else None
        self._keys: set[str] = set()  # of the new ones, where there are earlier ones
        self._waiting: list[Mapping[str, Any]] = []
        self._writer: Any = None

    def add(self, record: Mapping[str, Any]) -> None:
        self.count += 1
        if self._after:
            self._keys.add(record["key"])
        self._wait(record)

    def _wait(self, record: Mapping[str, Any]) -> None:
        self._waiting.append(record)
        if len(self._waiting) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow
        from pyarrow import parquet

        schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in RECORD.items()])
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._partial, schema, compression="zstd")
        self._writer.write_table(pyarrow.Table.from_pylist(self._waiting, schema=schema))
        self._waiting = []

    def close(self) -> None:
        from pyarrow import parquet

        if self._after:
            with parquet.ParquetFile(self._after) as file:
                for batch in file.iter_batches(BATCH):
                    for record in batch.to_pylist():
                        if record["key"] not in self._keys:
                            self._wait(record)
        if self._waiting or self._writer is None:
            self._flush()
        self._writer.close()
        self._partial.replace(self._path)

    def abandon(self) -> None:
        """Give up the file, unless it is closed."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # a full disk
                self._writer.close()


def read_records(folder: Path, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Columns of the records of a split, some at a time, in their order."""
    from pyarrow import parquet

    for path in sorted(folder.glob("*.parquet")):
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH, columns=list(columns)):
                yield batch.to_pydict()


@dataclass(slots=True)
class Summary:
    """Sums over records. ``values``: how many good samples have which value of a field of COUNTED; ``rules``: how
    many were filtered by which rule."""

    samples: int = 0
    broken: int = 0
    passing: int = 0  # of the broken ones, by a download that may succeed another time
    filtered: int = 0
    rules: Counter[str] = field(default_factory=Counter)
    totals: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMMED, 0))
    values: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in COUNTED})

    def __iadd__(self, other: Summary) -> Summary:
        self.samples, self.broken = self.samples + other.samples, self.broken + other.broken
        self.passing, self.filtered = self.passing + other.passing, self.filtered + other.filtered
        self.rules.update(other.rules)
        for name in SUMMED:
            self.totals[name] += other.totals[name]
        for name in COUNTED:
            self.values[name].update(other.values[name])
        return self

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples, "broken": self.broken, "may_pass": self.passing,
            "filtered": self.filtered, **self.totals,
            "rules": dict(sorted(self.rules.items())),
            **{name: dict(sorted(counts.items())) for name, counts in self.values.items()},
        }  # fmt: skip


def skipped(folder: Path, sums: Summary) -> Iterator[dict[str, Any]]:
    """Key, reason and more of the rows of a split that have no sample, while ``sums`` counts all rows; of a row that
    was tried again, the last try. In memory are the broken ones alone."""
    broken: dict[str, dict[str, Any]] = {}
    for batch in read_records(folder, (*SKIPPED, *SUMMED, *COUNTED)):
        good = []
        for number, (key, status) in enumerate(zip(batch["key"], batch["status"], strict=True)):
            broken.pop(key, None)
            if status == OK:
                good.append(number)
                continue
            record = {name: batch[name][number] for name in SKIPPED}
            if status == BROKEN:
                broken[key] = record
            else:
                sums.filtered += 1
                sums.rules[rule_of(record["reason"])] += 1
                yield record
        sums.samples += len(good)
        for name in SUMMED:
            sums.totals[name] += sum(batch[name][number] or 0 for number in good)
        for name in COUNTED:
            sums.values[name].update(batch[name][number] or "" for number in good)
    sums.broken += len(broken)
    sums.passing += sum(bool(record["retry"]) for record in broken.values())
    yield from broken.values()


def read_skipped(path: Path) -> Iterator[dict[str, Any]]:
    """What ``write_skipped`` wrote. Raises ValueError."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
                status = FILTERED if values.get("filtered") else BROKEN
                yield {"key": values["key"], "reason": values["reason"], "status": status,
                       "retry": bool(values.get("retry"))}  # fmt: skip
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(
                    f"{path} line {number} is not what was written there, an object with key and reason; mend it, or "
                    f"write the shards anew, with --overwrite and without --retry"
                ) from None


def write_skipped(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Rows without a sample as JSON lines: key and reason, and whether a filter or a fault that may pass was it."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            line = {"key": record["key"], "reason": record["reason"]}
            line |= {"filtered": True} if record["status"] == FILTERED else {}
            line |= {"retry": True} if record["retry"] else {}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
