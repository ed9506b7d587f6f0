"""The values of a field of the JSONs of an indexed source, such as its languages, in a file beside the index.

``mmmoe-data index CONFIG`` makes it where a source of the config has ``split_by`` with the field: reading every JSON
at each start would take too long. The file is NumPy's ``.npz``: ``values`` (texts), ``ids`` uint16 [N],
and ``bytes`` of each shard, which tell whether they are those of other shards.
"""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash

from mmmoe_pretrain.data.decode import BadSampleError, read_row, text_of_field
from mmmoe_pretrain.data.sources.members import META
from mmmoe_pretrain.data.sources.source import Indexed
from mmmoe_pretrain.kinds import nearest
from mmmoe_pretrain.progress import Progress
from mmmoe_pretrain.urls import redacted

MOST_VALUES = 4096
MOST_FIELDS = 32  # that a message names
SEARCHED = 64  # samples whose JSON is read to tell whether there is a field
MODALITIES = "modalities"  # the value of split_by that is not a field


def field_path(source: Indexed, field: str) -> Path:
    """Where the values of ``field`` are."""
    path = source.index_path
    return path.with_name(f"{path.name}-{xxhash.xxh3_64_hexdigest(field.encode())}.field.npz")


def measure_field(source: Indexed, field: str) -> tuple[list[str], np.ndarray]:
    """Read every JSON of ``source``, and write the values of ``field``, which ``read_field`` then gives; a sample
    without a text there has the value "". Raises ValueError where no sample has one, or there are more than
    MOST_VALUES."""
    path, ids, fields = field_path(source, field), dict[str, int](), set[str]()
    found = np.zeros(len(source), dtype=np.uint16)
    with Progress(f"reading {field}", len(source), "samples") as progress:
        for i in range(len(source)):
            try:
                row = read_row(source.read(i, only=(META,)))
            except BadSampleError:
                row = {}
            text = (text_of_field(row.get(field)) or "").rstrip("\0")  # as NumPy keeps it
            found[i] = ids.setdefault(text, len(ids))
            if len(fields) < MOST_FIELDS:
                fields.update(name for name, its in row.items() if text_of_field(its))
            if len(ids) > MOST_VALUES:
                raise ValueError(
                    f"the field {field} has more than {MOST_VALUES} values, and each would be a part of the source; "
                    f"split by a field with fewer"
                )
            progress.advance()
    if not any(ids):
        raise ValueError(_no_text(source, field, fields))
    part = path.with_name(f"{path.name}.{os.getpid()}.part.npz")
    try:
        np.savez(part, values=np.asarray(list(ids)), ids=found, bytes=source.shard_bytes)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return list(ids), found


def refuse_unknown(source: Indexed, field: str) -> None:
    """Raise ValueError where none of some samples has a text in ``field``."""
    fields = set[str]()
    for i in np.unique(np.linspace(0, len(source) - 1, SEARCHED).astype(int)).tolist():
        with suppress(BadSampleError):
            fields.update(
                name for name, its in read_row(source.read(i, only=(META,))).items() if text_of_field(its) is not None
            )
    if field not in fields:
        raise ValueError(_no_text(source, field, fields))


def _no_text(source: Indexed, field: str, fields: set[str]) -> str:
    known = sorted(fields - {"key"})
    hint = nearest(field, [*known, MODALITIES], "the fields with texts are") if known else f"use {MODALITIES}"
    return (
        f"data.train: no sample of {redacted(source.spec)} has a text in the field {field} of its JSON; correct "
        f"split_by: {hint}"
    )


def read_field(source: Indexed, field: str) -> tuple[list[str], np.ndarray] | None:
    """The values of ``field``, and of each sample the number of its value; None where no file of shards of these
    sizes has them, or none of them is a text."""
    try:
        with np.load(field_path(source, field), allow_pickle=False) as file:
            values, ids = [str(value) for value in file["values"]], np.asarray(file["ids"])
            same = np.array_equal(file["bytes"], source.shard_bytes)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
    if (
        not (same and any(values))
        or ids.shape != (len(source),)
        or ids.dtype != np.uint16
        or int(ids.max(initial=0)) >= len(values)
    ):
        return None
    return values, ids
