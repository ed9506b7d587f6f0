"""What ``dedup`` found, as Parquet files: the samples to drop, and lists of hashes for later comparisons.

``kept`` gives the samples of a source that a report leaves, for whoever writes shards of them.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from pyarrow import parquet

from mmmoe_pretrain.data.sources.listing import is_remote
from mmmoe_pretrain.data.sources.source import Indexed
from mmmoe_pretrain.data_prep.quality.repeats import Repeats
from mmmoe_pretrain.data_prep.quality.samples import DOCUMENT, NOTHING, Samples, Settings
from mmmoe_pretrain.data_prep.rows.row import SPLITS
from mmmoe_pretrain.paths import new_file
from mmmoe_pretrain.progress import track
from mmmoe_pretrain.untrusted import brief, parse_json
from mmmoe_pretrain.urls import local_path, redacted

# Of the report; ``row``: the number of the sample in its shard; ``distance``: of a near one, the bits by which images
# differ, or 1 - similarity of the texts.
COLUMNS = {"shard": "string", "row": "int64", "key": "string", "split": "string", "by": "string", "kind": "string",
           "of_shard": "string", "of_key": "string", "of_split": "string", "distance": "float32"}  # fmt: skip
HASHES = {"key": "string", "by": "string", "xxh3_128": "string"}
LIST_COLUMNS = ("xxh3_128", "image_xxh3", "audio_xxh3")  # of a Parquet file of hashes; the latter are of records
LIST_SUFFIXES = (".parquet", ".txt")
MAX_HASHES = 100_000_000  # of a list
_FOLDERS = b"mmmoe.folders"  # of the metadata: where the compared shards lie
_AT_ONCE = 65_536
_HASH = re.compile(r"[0-9a-f]{32}", re.IGNORECASE)
_MAX_LINE = 1024


@dataclass(slots=True)
class Found:
    """What was compared, and which samples repeat others."""

    samples: Samples
    repeats: Repeats
    settings: Settings

    @property
    def dropped(self) -> np.ndarray:
        return np.flatnonzero(self.repeats.of >= 0)

    def counts(self) -> tuple[int, int, int]:
        """The samples that were compared, and of them the exact and the near duplicates."""
        near = int(self.repeats.near[self.dropped].sum())
        return int((~self.samples.held_out()).sum()), len(self.dropped) - near, near

    def place(self, number: int) -> tuple[str, int, str]:
        """The shard of a sample, its number there and its key; of a hash its list and line."""
        source, at = self.samples.place(number)
        if source.shards is None:
            return source.name, at, f"hash {at + 1}"
        shard = int(np.searchsorted(source.ends, at, side="right"))
        row = at - int(source.ends[shard - 1]) if shard else at
        return label(source.shards.urls[shard]), row, source.shards.key(at)

    def row(self, number: int) -> dict[str, Any]:
        """Of the report."""
        records, of = self.samples.records, int(self.repeats.of[number])
        (shard, row, key), (of_shard, _, of_key) = self.place(number), self.place(of)
        split, of_split = ([*SPLITS, ""][records["split"][n]] for n in (number, of))
        is_near = bool(self.repeats.near[number])
        return {
            "shard": shard, "row": row, "key": key, "split": split, "by": self.form(number),
            "kind": "near" if is_near else "exact", "of_shard": of_shard, "of_key": of_key, "of_split": of_split,
            "distance": float(self.repeats.distance[number]) if is_near else 0.0,
        }  # fmt: skip

    def form(self, number: int) -> str:
        """By what a sample was compared."""
        form = int(self.samples.records["form"][number])
        return "document" if form == DOCUMENT else "+".join(self.settings.by[form])


def label(url: str) -> str:
    """The name of a shard in a report: one for each file, whatever the path to it."""
    return redacted(url) if is_remote(url) else os.path.realpath(local_path(url))


def refuse_name(path: Path) -> None:
    """Raise ValueError where no Parquet file can be written to ``path``."""
    if path.suffix != ".parquet" or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: name a Parquet file (FILE.parquet) in a folder that exists")


def write_report(path: Path, found: Found) -> None:
    """A row for each sample to drop."""
    urls = [url for source in found.samples.sources if source.shards is not None for url in source.shards.urls]
    folders = sorted({label(url).rpartition("/")[0] for url in urls})
    dropped = found.dropped
    rows = (found.row(int(number)) for number in track(dropped, "writing the report", len(dropped), "rows"))
    _write(path, COLUMNS, rows, {_FOLDERS: json.dumps(folders).encode()})


def write_hashes(path: Path, found: Found) -> None:
    """The digest of each sample that remains, for ``--against``."""
    digests = found.samples.records["digest"]
    own = (found.repeats.of < 0) & ~found.samples.held_out() & (found.samples.records["form"] != NOTHING)
    numbers = np.flatnonzero(own)
    rows = (
        {"key": found.place(n)[2], "by": found.form(n), "xxh3_128": digests[n].astype(">u8").tobytes().hex()}
        for n in map(int, track(numbers, "writing hashes", len(numbers), "rows"))
    )
    _write(path, HASHES, rows, {})


def _write(path: Path, columns: dict[str, str], rows: Iterator[dict[str, Any]], metadata: dict[bytes, bytes]) -> None:
    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in columns.items()], metadata)
    with new_file(path) as draft, parquet.ParquetWriter(draft, schema, compression="zstd") as writer:
        while batch := list(itertools.islice(rows, _AT_ONCE)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))


def is_list(name: str) -> bool:
    """Whether ``name`` is a list of hashes, and not of shards."""
    return not is_remote(name) and Path(name).suffix.lower() in LIST_SUFFIXES and not Path(name).is_dir()


def read_hashes(path: Path) -> np.ndarray:
    """The digests, uint64 [n, 2], in the lines of a text file or columns of a Parquet file. Raises ValueError."""
    found = _of_text(path) if path.suffix.lower() == ".txt" else _of_parquet(path)
    data, known = bytearray(), 0
    for number, value in enumerate(found, 1):
        if value is None or value == "":
            continue
        if not isinstance(value, str) or not _HASH.fullmatch(value):
            raise ValueError(
                f"{path}, hash {number}: {brief(value)} is no xxh3_128 of 32 hexadecimal digits; write lists by "
                f"mmmoe-data dedup --hashes FILE.parquet"
            )
        known += 1
        if known > MAX_HASHES:
            raise ValueError(f"{path} has more than {MAX_HASHES:,} hashes; split it")
        data += bytes.fromhex(value)
    return np.frombuffer(bytes(data), ">u8").astype("<u8").reshape(-1, 2)


def _of_text(path: Path) -> Iterator[str]:
    with path.open(encoding="ascii", errors="replace") as file:
        while line := file.readline(_MAX_LINE):
            yield line.strip()


def _of_parquet(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        names = [name for name in LIST_COLUMNS if name in file.schema_arrow.names]
        if not names:
            has = ", ".join(file.schema_arrow.names[:8])
            raise ValueError(f"{path} has no column {', '.join(LIST_COLUMNS)} of hashes (its columns: {has})")
        for batch in file.iter_batches(_AT_ONCE, columns=names):
            for name in names:
                yield from batch.column(name).to_pylist()


def _opened(path: Path) -> parquet.ParquetFile:
    try:
        return parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file ({str(error).splitlines()[0]})") from None


def kept(source: Indexed, report: Path) -> np.ndarray:
    """bool [n]: the samples of ``source`` that ``report`` does not name. Raises ValueError where it is of others."""
    sizes = source.shard_sizes
    starts = dict(zip(map(label, source.urls), (np.cumsum(sizes) - sizes).tolist(), strict=True))
    mask = np.ones(len(source), bool)
    with _opened(report) as file:
        folders = parse_json((file.schema_arrow.metadata or {}).get(_FOLDERS, b"[]"), f"{report}: its metadata")
        missing = sorted({shard.rpartition("/")[0] for shard in starts}.difference(map(str, folders)))
        if missing or file.schema_arrow.names != [*COLUMNS]:
            where = missing[0] if missing else redacted(source.spec)
            raise ValueError(f"{report} is no report of shards in {where}; make it by mmmoe-data dedup --report")
        for batch in file.iter_batches(_AT_ONCE, columns=["shard", "row", "key"]):
            for row in batch.to_pylist():
                if row["shard"] not in starts:
                    continue
                number = starts[row["shard"]] + (row["row"] or 0)
                if not 0 <= number < len(source) or source.key(number) != row["key"]:
                    raise ValueError(
                        f"{report} names {brief(row['key'])} as sample {row['row']} of {row['shard']}, which is "
                        f"another one now; run mmmoe-data dedup again"
                    )
                mask[number] = False
    return mask
