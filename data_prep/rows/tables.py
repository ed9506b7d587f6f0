"""Tables as rows: CSV, TSV, JSON lines, a JSON list, lists of URLs; Parquet and Arrow are in ``parquet.py``.

Text files are read line by line, with a bound on the length of a line.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
import itertools
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

from mmmoe_pretrain.data.sources.listing import is_remote
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.rows.columns import choose, is_known
from mmmoe_pretrain.data_prep.rows.manifest import lines
from mmmoe_pretrain.data_prep.rows.refs import Ref, file_name
from mmmoe_pretrain.data_prep.rows.row import Fault, Found
from mmmoe_pretrain.limits import MAX_META_BYTES
from mmmoe_pretrain.progress import Progress, counted
from mmmoe_pretrain.untrusted import MAX_JSON_BYTES, brief, parse_json
from mmmoe_pretrain.urls import local_path, redacted

DELIMITERS = ",\t;|"
LOOKED_AT = 1000  # objects whose fields are the columns of JSON lines


class Record(NamedTuple):
    """A line of a table. ``cells``: what its columns with bytes hold."""

    where: str
    values: Mapping[str, Any]
    cells: Mapping[str, Ref | None] | None = None


@dataclass(slots=True)
class Table:
    """``kinds``: of columns whose type tells what they hold; ``labels``: the names of classes that are numbers."""

    names: list[str]
    records: Iterator[Record | Fault]
    kinds: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    suffixes: Mapping[str, str] = field(default_factory=dict)  # of the files in columns of bytes, as the first one's


class Source(NamedTuple):
    """A table that is to be read: a path or URL, the ``folder`` that its paths are below (of the root, or a URL), and
    the split of its rows."""

    path: str
    folder: str = ""
    split: str = ""
    subset: str = ""


@contextmanager
def opened(path: str, files: Files) -> Iterator[BinaryIO]:
    """A file at a path or URL, to be read in order; unpacked, where it is called ``.gz``."""
    files.stat(path)  # a folder or a pipe is refused here
    with files.stream(path) if is_remote(path) else open(local_path(path), "rb") as file:
        if not file_name(path).lower().endswith(".gz"):
            yield file
            return
        try:
            with gzip.open(file, "rb") as unpacked:
                yield cast(BinaryIO, unpacked)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{redacted(path)} is damaged: {error}") from None


def table_sources(place: str, root: Path) -> Iterator[Source]:
    """A table at a path or URL, or those in a folder; paths in it are relative to its folder."""
    if is_remote(place):
        before, mark, query = place.partition("?")
        yield Source(place, f"{before.rpartition('/')[0]}{mark}{query}")
        return
    path = Path(local_path(place)).absolute()
    inner = (each for each in path.iterdir() if is_table(each.name)) if path.is_dir() else ()
    for each in sorted(inner) or [path]:
        below = os.path.relpath(each.parent, root)
        yield Source(str(each), "" if below == "." else below)


def text_table(source: Source, files: Files) -> Table:
    """A table in a text file, by its suffix; ``metadata.csv`` beside ``wavs`` is LJSpeech's."""
    suffix = ending(source.path.removesuffix(".gz"))
    if suffix not in TEXT_TABLES:
        known = ", ".join((*TEXT_TABLES, "parquet"))
        raise ValueError(f"{redacted(source.path)} is no table; a table is a file with one of the suffixes {known}")
    if is_ljspeech(source.path):
        return _ljspeech(source.path, files)
    return TEXT_TABLES[suffix](source.path, files)


def is_table(name: str) -> bool:
    """Whether a file in a folder is called as tables are; a list of URLs or of JSON must be named itself."""
    return ending(name) in (*TEXT_TABLES, "parquet") and ending(name) not in ("txt", "json")


def is_ljspeech(path: str) -> bool:
    """Whether a table is LJSpeech's: ID|TEXT|NORMALIZED TEXT without a header, beside the folder ``wavs``."""
    place = Path(local_path(path))
    if is_remote(path) or place.name != "metadata.csv" or not (place.is_file() and (place.parent / "wavs").is_dir()):
        return False
    with place.open("rb") as file:
        return b"|" in file.readline(MAX_META_BYTES)


def ending(path: str) -> str:
    return PurePosixPath(file_name(path)).suffix[1:].lower()


def rows_of(
    sources: Sequence[Source], open_table: Callable[[Source], Table], given: Mapping[str, str], notes: list[str]
) -> Iterator[Found | Fault]:
    """The rows of tables one after another. ``notes`` gets which columns were taken for what."""
    number, noted = itertools.count(1), ""
    for source in sources:
        name, table = redacted(source.path), open_table(source)
        columns = dataclasses.replace(
            choose(table.names, given, name, table.kinds),
            folder=source.folder, split=source.split, subset=source.subset, labels=table.labels,
            suffixes=table.suffixes,
        )  # fmt: skip
        if columns.note() != noted:
            notes.append(f"{name}: {columns.note()}")
            noted = columns.note()
        with Progress(f"reading {file_name(source.path)}", None, "rows") as progress:
            for record in table.records:
                progress.advance()
                where = f"{name} {record.where}" if len(sources) > 1 else record.where
                try:
                    if isinstance(record, Fault):
                        raise ValueError(record.reason)
                    yield Found(where, columns.row(record.values, next(number), record.cells))
                except ValueError as error:
                    yield Fault(where, str(error))
        notes += table.notes


def _csv(path: str, files: Files) -> Table:
    """The first line names the columns; the delimiter is the one that it holds most often."""
    text = _text_lines(path, files)
    first, header = _first_line(text)
    delimiter = max(DELIMITERS, key=header.count)
    csv.field_size_limit(MAX_META_BYTES)
    reader = csv.reader(itertools.chain([header], text), delimiter=delimiter, strict=True)
    try:
        names = _header(next(reader, []), path)
    except csv.Error as error:
        raise ValueError(f"{redacted(path)} line {first} is not CSV ({error}); it names the columns") from None

    def records() -> Iterator[Record | Fault]:
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                reason = f"it is not CSV ({error}); double the quotes in a quoted field"
                yield Fault(f"line {first - 1 + reader.line_num}", reason)
                continue
            if fields:
                yield _record(names, fields, first - 1 + reader.line_num)

    return Table(names, records())


def _tsv(path: str, files: Files) -> Table:
    """Tabs cut each line, whatever quotes it has: a quoted field loses its quotes where it is whole."""
    text = _text_lines(path, files)
    first, header = _first_line(text)
    names = _header([_unquoted(name) for name in _cut(header, "\t")] if header else [], path)
    numbered = enumerate(text, first + 1)
    return Table(names, (_record(names, [_unquoted(each) for each in _cut(line, "\t")], n) for n, line in numbered
                         if line.strip()))  # fmt: skip


def _ljspeech(path: str, files: Files) -> Table:
    names = ["id", "raw_text", "normalized_text", "audio"]

    def records() -> Iterator[Record | Fault]:
        for number, line in enumerate(_text_lines(path, files), 1):
            fields = _cut(line, "|")
            if line.strip() and len(fields) in (2, 3):
                key, raw, normalized = fields[0], fields[1], fields[-1]
                yield _record(names, [key, raw, normalized, f"wavs/{key}.wav"], number)
            elif line.strip():
                yield Fault(
                    f"line {number}", f"it has {len(fields)} fields, and ID|TEXT|NORMALIZED TEXT are expected"
                )

    return Table(names, records())


def _url_list(path: str, files: Files) -> Table:
    """A URL or path a line; CSV, where the first line holds names of columns that are known."""
    header = _first_line(_text_lines(path, files))[1]
    if any(is_known(name) for delimiter in DELIMITERS for name in header.split(delimiter)):
        return _csv(path, files)
    numbered = enumerate(_text_lines(path, files), 1)
    return Table(["url"], (Record(f"line {n}", {"url": line.strip()}) for n, line in numbered if line.strip()))


def _json_lines(path: str, files: Files) -> Table:
    """An object a line."""

    def records() -> Iterator[Record | Fault]:
        with opened(path, files) as file:
            for number, line in lines(file):
                yield _object(line, f"line {number}")

    return _of_objects(records())


def _json_list(path: str, files: Files) -> Table:
    """A list of objects."""
    with opened(path, files) as file:
        held = parse_json(file.read(MAX_JSON_BYTES + 1), redacted(path))
    if not isinstance(held, list):
        what = f"an object with {', '.join(map(brief, list(held)[:8]))}" if isinstance(held, dict) else brief(held)
        raise ValueError(f"{redacted(path)} holds {what}, not a list of rows; write its rows as JSON lines (.jsonl)")
    rows = (
        Record(f"row {n}", row) if isinstance(row, dict) else Fault(f"row {n}", f"it is {brief(row)}, not an object")
        for n, row in enumerate(held, 1)
    )
    return _of_objects(rows)


TEXT_TABLES = {
    "csv": _csv, "tsv": _tsv, "tab": _tsv, "jsonl": _json_lines, "ndjson": _json_lines, "json": _json_list,
    "txt": _url_list,
}  # fmt: skip


def _object(line: bytes, where: str) -> Record | Fault:
    try:
        value = parse_json(line, "it", MAX_META_BYTES)
        if not isinstance(value, dict):
            raise ValueError(f"it is {type(value).__name__}, not an object")
        return Record(where, value)
    except ValueError as error:
        return Fault(where, str(error))


def _of_objects(records: Iterator[Record | Fault]) -> Table:
    first = list(itertools.islice(records, LOOKED_AT))
    names = dict.fromkeys(name for record in first if isinstance(record, Record) for name in record.values)
    return Table(list(names), itertools.chain(first, records))


def _text_lines(path: str, files: Files) -> Iterator[str]:
    """Lines in UTF-8 with their ends; raises ValueError with the number of one that is too long or no UTF-8."""
    where = redacted(path)
    convert = f"iconv -f {{}} -t UTF-8 {file_name(path)} > utf8.{ending(path)}"
    with opened(path, files) as file:
        number = 0
        while line := file.readline(MAX_META_BYTES + 1):
            number += 1
            if number == 1 and (line[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in line):
                raise ValueError(f"{where} is UTF-16 or no text; convert it: {convert.format('UTF-16')}")
            if len(line) > MAX_META_BYTES:
                raise ValueError(f"{where} line {number} has more than {MAX_META_BYTES:,} bytes; make it shorter")
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise ValueError(
                    f"{where} line {number} is not UTF-8 (byte 0x{byte:02x}); convert it, e.g. "
                    f"{convert.format('WINDOWS-1252')}"
                ) from None


def _first_line(text: Iterator[str]) -> tuple[int, str]:
    """The first line that is not blank, after its number."""
    return next(((number, line) for number, line in enumerate(text, 1) if line.strip()), (1, ""))


def _header(names: list[str], path: str) -> list[str]:
    names = [name.strip() or f"column_{number}" for number, name in enumerate(names, 1)]
    require_distinct(names, path)
    if not names:
        raise ValueError(f"{redacted(path)} is empty; its first line names its columns")
    return names


def require_distinct(names: list[str], path: str) -> None:
    """Raise ValueError where two columns have one name: one of them would be lost."""
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ValueError(f"{redacted(path)} has several columns named {brief(twice[0])}; rename them")


def _record(names: list[str], fields: list[str], line: int) -> Record | Fault:
    if len(fields) != len(names):
        return Fault(
            f"line {line}",
            f"it has {counted(len(fields), 'field')}, and the table has {counted(len(names), 'column')}",
        )
    return Record(f"line {line}", dict(zip(names, fields, strict=True)))


def _cut(line: str, delimiter: str) -> list[str]:
    return line.rstrip("\r\n").split(delimiter)


def _unquoted(text: str) -> str:
    inner = text[1:-1] if len(text) > 1 and text[0] == text[-1] == '"' else None
    if inner is None or '"' in inner.replace('""', ""):
        return text
    return inner.replace('""', '"')
