"""Parquet files and Arrow streams as tables. What lies in cells as bytes stays there until it is encoded.

A column of bytes, or of Hugging Face's ``{"bytes", "path"}``, is an image or clip of audio by its type in the
features of Hugging Face's datasets, by its name, or by the first bytes in it. Nested bytes are left out with a note.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.rows.columnar import (
    CELLS_AT_ONCE,
    ROWS_AT_ONCE,
    batches,
    open_arrow,
    open_parquet,
    reason,
    values,
)
from mmmoe_pretrain.data_prep.rows.columns import KNOWN
from mmmoe_pretrain.data_prep.rows.fields import format_by_start
from mmmoe_pretrain.data_prep.rows.refs import Cell, Ref, printable
from mmmoe_pretrain.data_prep.rows.row import Fault
from mmmoe_pretrain.data_prep.rows.tables import Record, Table, require_distinct
from mmmoe_pretrain.modalities import format_of
from mmmoe_pretrain.progress import counted
from mmmoe_pretrain.urls import redacted

if TYPE_CHECKING:
    import pyarrow

TOLD_BYTES = 8 << 20  # of rows that become Python objects at once, where their sizes are as the file says


@dataclass(slots=True)
class _Shape:
    """What the columns hold. ``held``: columns of bytes, with whether they are Hugging Face's structs."""

    held: dict[str, bool] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def parquet_table(path: str, name: str, files: Files) -> Table:
    """The table at a path or URL; ``name``: of the file in refs."""
    import pyarrow

    where = redacted(path)
    try:
        file = open_parquet(path, files)
        schema, groups = file.schema_arrow, range(file.metadata.num_row_groups)
        require_distinct(schema.names, path)
        shape = _shape(schema)

        def first(column: str) -> bytes:
            found = (batch for group in groups for batch in batches(file, group, [column], CELLS_AT_ONCE))
            return _first(column, found)

        suffixes = {column: format_by_start(first(column)) for column in shape.held}
        kinds, labels = _kinds(schema, shape, suffixes)
    except (pyarrow.ArrowException, MemoryError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{where} is no Parquet file that can be read ({reason(error)})") from None
    records = _parquet_records(file, shape, name, where)
    return Table(schema.names, records, kinds, labels, _notes(where, shape), suffixes)


def arrow_table(path: str, name: str) -> Table:
    """An Arrow stream of Hugging Face's ``save_to_disk``."""
    import pyarrow

    try:
        found = open_arrow(path)
    except (pyarrow.ArrowException, MemoryError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no Arrow stream that can be read ({reason(error)})") from None
    if not found:
        return Table([], iter(()))
    schema = found[0].schema
    require_distinct(schema.names, path)
    shape = _shape(schema)
    suffixes = {
        column: format_by_start(_first(column, (batch[:CELLS_AT_ONCE] for batch in found))) for column in shape.held
    }
    kinds, labels = _kinds(schema, shape, suffixes)
    return Table(schema.names, _arrow_records(found, shape, name), kinds, labels, _notes(path, shape), suffixes)


def _shape(schema: pyarrow.Schema) -> _Shape:
    from pyarrow import types

    shape = _Shape()
    for column in schema:
        kind = column.type
        if _is_bytes(kind):
            shape.held[column.name] = False
        elif types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type):
            shape.held[column.name] = True
        elif _holds_bytes(kind):
            shape.left_out.append(column.name)
        else:
            shape.plain.append(column.name)
    return shape


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _holds_bytes(kind: Any) -> bool:
    return _is_bytes(kind) or any(_holds_bytes(kind.field(n).type) for n in range(getattr(kind, "num_fields", 0)))


def _kinds(
    schema: pyarrow.Schema, shape: _Shape, suffixes: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """What columns hold by type, name or content; and the names of classes that are numbers."""
    features = _features(schema)
    kinds: dict[str, str] = {}
    for column in shape.held:
        type_name = features.get(column, {}).get("_type")
        named = next((kind for kind in ("image", "audio") if column.lower() in KNOWN[kind]), None)
        kind = {"Image": "image", "Audio": "audio"}.get(str(type_name)) or named
        kind = kind or format_of(suffixes[column] or "-")
        if kind in ("image", "audio"):
            kinds[column] = kind
    for column in [column for column in shape.held if column not in kinds]:
        del shape.held[column]
        shape.left_out.append(column)
    classes = {
        name: feature.get("names") for name, feature in features.items() if feature.get("_type") == "ClassLabel"
    }
    for column, feature in features.items():  # files of which only the path is kept
        if feature.get("_type") in ("Image", "Audio") and column in shape.plain:
            kinds[column] = str(feature["_type"]).lower()
    return kinds, {name: [str(each) for each in names] for name, names in classes.items() if isinstance(names, list)}


def _features(schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """The features of Hugging Face's datasets in the schema; none where it holds none."""
    try:
        held = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        found = held["info"]["features"]
        return {str(name): value for name, value in found.items() if isinstance(value, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _parquet_records(file: Any, shape: _Shape, name: str, where: str) -> Iterator[Record | Fault]:
    import pyarrow

    leaves = [*shape.plain, *(f"{column}.path" for column, struct in shape.held.items() if struct)]
    number = 0
    with closing(file):
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            try:
                known = {column: _valid(file, column, struct, group) for column, struct in shape.held.items()}
                found = batches(file, group, leaves, _at_once(file, leaves, group)) if leaves else ()
                records = (row for batch in found for row in values(batch)) if leaves else ({} for _ in range(rows))
                for row, value in enumerate(records):
                    number += 1
                    cells = {
                        column: _ref(name, column, group, row, value.pop(column, None), valid[row], number)
                        for column, valid in known.items()
                    }
                    yield Record(f"row {number}", value, cells)
            except (pyarrow.ArrowException, MemoryError, OSError, UnicodeDecodeError) as error:
                yield Fault(f"row group {group}", f"it cannot be read ({reason(error)})")


def _arrow_records(found: list[pyarrow.RecordBatch], shape: _Shape, name: str) -> Iterator[Record | Fault]:
    import pyarrow

    number = 0
    for group, batch in enumerate(found):
        try:
            known = {column: _validity(batch.column(column)) for column in shape.held}
            told = {column: batch.column(column) for column in shape.plain} | _paths(batch, shape)
            rows = values(pyarrow.record_batch(told)) if told else ({} for _ in range(batch.num_rows))
            for row, value in enumerate(rows):
                number += 1
                cells = {
                    column: _ref(name, column, group, row, {"path": value.pop(column, None)}, valid[row], number)
                    for column, valid in known.items()
                }
                yield Record(f"row {number}", value, cells)
        except (pyarrow.ArrowException, MemoryError, UnicodeDecodeError) as error:
            yield Fault(f"batch {group}", f"it cannot be read ({reason(error)})")


def _ref(name: str, column: str, group: int, row: int, value: Any, valid: bool, number: int) -> Ref | None:
    """The bytes in the cell, else the file that its path names."""
    path = value.get("path") if isinstance(value, dict) else None
    if not valid:
        return path or None
    base = PurePosixPath(printable(path)).name if isinstance(path, str) else ""
    known = format_of(PurePosixPath(base).suffix[1:].lower()) in ("image", "audio")
    return Cell(name, base if known else f"row {number}", column, group, row)


def _at_once(file: Any, leaves: list[str], group: int) -> int:
    """How many rows of a row group are read at once: fewer where they are long."""
    meta = file.metadata.row_group(group)
    wanted = {leaf.split(".")[0] for leaf in leaves}
    chunks = (meta.column(number) for number in range(meta.num_columns))
    size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in wanted)
    return max(1, min(ROWS_AT_ONCE, TOLD_BYTES * meta.num_rows // max(size, 1)))


class _All:
    """``valid`` of a column in which every cell is, or none."""

    def __init__(self, valid: bool) -> None:
        self._valid = valid

    def __getitem__(self, row: int) -> bool:
        return self._valid


def _valid(file: Any, column: str, struct: bool, group: int) -> Any:
    """Whether each cell of a row group holds bytes; they are read only where statistics don't tell."""
    meta = file.metadata.row_group(group)
    for number in range(meta.num_columns):
        chunk = meta.column(number)
        if chunk.path_in_schema == (f"{column}.bytes" if struct else column):
            statistics = chunk.statistics
            if statistics is not None and statistics.has_null_count and statistics.null_count in (0, meta.num_rows):
                return _All(statistics.null_count == 0)
    found = batches(file, group, [column], CELLS_AT_ONCE)
    return [each for batch in found for each in _validity(batch.column(column))]


def _validity(column: pyarrow.Array) -> list[bool]:
    """Whether each cell of a batch holds bytes."""
    from pyarrow import compute, types

    held = compute.struct_field(column, "bytes") if types.is_struct(column.type) else column
    found: list[bool] = held.is_valid().to_pylist()
    return found


def _paths(batch: pyarrow.RecordBatch, shape: _Shape) -> dict[str, pyarrow.Array]:
    """The paths in columns of Hugging Face's structs."""
    from pyarrow import compute

    structs = {column: batch.column(column) for column, struct in shape.held.items() if struct}
    return {
        column: compute.struct_field(held, "path")
        for column, held in structs.items()
        if held.type.get_field_index("path") >= 0
    }


def _first(column: str, found: Iterator[pyarrow.RecordBatch]) -> bytes:
    """The first bytes that a cell holds."""
    cells = (_bytes_of(scalar.as_py()) for batch in found for scalar in batch.column(column))
    return next(filter(None, cells), b"")


def _bytes_of(value: Any) -> bytes | None:
    data = value.get("bytes") if isinstance(value, Mapping) else value
    return data if isinstance(data, bytes) else None


def _notes(where: str, shape: _Shape) -> list[str]:
    if not shape.left_out:
        return []
    count = counted(len(shape.left_out), "column")
    return [f"{where}: {count} with bytes that are no image or audio left out: {', '.join(shape.left_out)}"]
