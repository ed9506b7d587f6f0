"""Facts from the training shards for the model card: their samples, licences and sources."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import BadSampleError, read_row
from mmmoe_pretrain.data.members import META
from mmmoe_pretrain.data.shards import RawSample, ShardFolder

MAX_ROWS = 10_000  # of a folder, spread evenly, whose JSON is read
NOT_STATED = "not stated"
LONGEST = 100  # characters of a licence or source


@dataclass(frozen=True)
class Licence:
    name: str
    rows: int
    sources: tuple[str, ...]  # those that the rows name


@dataclass(frozen=True)
class DataFacts:
    """``samples``: by folder, of those that can be read here. ``licences``: of ``read`` rows, the most rows first."""

    samples: dict[str, int]
    licences: tuple[Licence, ...]
    read: int


def data_facts(config: RunConfig) -> DataFacts:
    """The facts of the folders in ``data.train``."""
    opened = ((source.path, _opened(source.path)) for source in config.data.train)
    folders = {path: folder for path, folder in opened if folder is not None}
    rows: Counter[str] = Counter()
    sources: dict[str, set[str]] = defaultdict(set)
    for row in (row for folder in folders.values() for row in _rows(folder)):
        name = _text(row.get("licence")) or NOT_STATED
        rows[name] += 1
        sources[name] |= {_text(row.get("source"))} - {""}
    licences = tuple(Licence(name, count, tuple(sorted(sources[name]))) for name, count in rows.most_common())
    return DataFacts({path: len(folder) for path, folder in folders.items()}, licences, rows.total())


def _opened(path: str) -> ShardFolder | None:
    try:
        return ShardFolder(path)
    except ValueError:  # the shards are elsewhere, or damaged
        return None


def _rows(folder: ShardFolder) -> Iterator[dict[str, Any]]:
    for i in np.linspace(0, len(folder) - 1, min(len(folder), MAX_ROWS)).astype(int).tolist():
        yield _json(folder.read(i, only=(META,)))


def _json(raw: RawSample) -> dict[str, Any]:
    try:
        return read_row(raw)
    except BadSampleError:
        return {}  # training skips such a sample


def _text(value: object) -> str:
    """One printable line of it."""
    return " ".join(value.split())[:LONGEST] if isinstance(value, str) and value.isprintable() else ""
