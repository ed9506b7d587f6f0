"""Rows of ``manifest.jsonl`` (docs/data_format.md): their schema, reading, writing and filtering.

The parts of a document are in ``documents.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.documents import PARTS, Part, parts_of
from mmmoe_pretrain.limits import (
    FIELD_ALIASES,
    MAX_KEY_BYTES,
    MAX_META_BYTES,
    MAX_NAME_BYTES,
    has_lone_surrogate,
    has_text,
    use_aliases,
)
from mmmoe_pretrain.progress import Progress, counted
from mmmoe_pretrain.untrusted import brief, parse_json

SPLITS = ("train", "val", "test")
AUDIO_KINDS = ("", "speech", "effect")
SPLIT_ALIASES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}
_CONTENT = ("image", "audio", "text")
_SHOWN = 20  # problems


@dataclass(frozen=True, slots=True)
class Row:
    """One sample: any non-empty subset of an image, a clip of audio and a text, or a document of ``parts``."""

    key: str
    image: str | None = None
    audio: str | None = None
    text: str | None = None
    language: str = ""
    audio_kind: str = ""
    label: str = ""
    group: str = ""
    split: str = "train"
    subset: str = ""
    source: str = ""
    licence: str = ""
    attribution: str = ""
    parts: Any = field(default=None, hash=False)  # of a document, as they are written; None: the row is none
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # fields of other names

    @property
    def modalities(self) -> tuple[str, ...]:
        """The kinds of its content; none for a damaged document."""
        if self.parts is not None:
            held = {part.name for part in self._parts if part.path or has_text(part.text or "")}
            return (*(name for name in _CONTENT if name in held), *sorted(held.difference(_CONTENT)))
        found = {"image": bool(self.image), "audio": bool(self.audio), "text": has_text(self.text or "")}
        return tuple(name for name in _CONTENT if found[name])

    @property
    def files(self) -> tuple[str, ...]:
        """The paths in it."""
        return tuple(filter(None, (self.image, self.audio, *(part.path for part in self._parts))))

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.text, *(part.text for part in self._parts))))

    @property
    def _parts(self) -> list[Part]:
        try:
            return [] if self.parts is None else parts_of(self.parts)
        except ValueError:
            return []


FIELDS = tuple(field.name for field in dataclasses.fields(Row) if field.name not in (PARTS, "extra"))


def row_fields(row: Row) -> dict[str, Any]:
    """The fields of a row's line in a manifest."""
    document = {} if row.parts is None else {PARTS: row.parts}
    values = {name: getattr(row, name) for name in FIELDS}
    return {**values, "key": urllib.parse.unquote(row.key), **document, **row.extra}


def sample_fields(row: Row) -> dict[str, Any]:
    """The content of ``KEY.json``: the row without its paths and its text."""
    return {**{name: getattr(row, name) for name in FIELDS if name not in _CONTENT}, **row.extra}


def sample_key(name: str) -> str:
    """``name`` in the alphabet of keys, ``[0-9A-Za-z_-]`` and %XX; ``urllib.parse.unquote`` decodes it.

    A dot would end the key, and a slash make a folder, where members of a tar are named by it.
    """
    return urllib.parse.quote(name, safe="").replace(".", "%2E").replace("~", "%7E")


def split_called(name: str) -> str:
    """``val`` for ``Validation``; a name that is not a split's, in lower case."""
    return SPLIT_ALIASES.get(name.lower(), name.lower())


def slug(text: str) -> str:
    """``text`` in ``[0-9a-z_-]``, for keys that are made here."""
    return re.sub(r"[^0-9a-z_]+", "-", text.lower()).strip("-")


def write_manifest(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows, to a temporary file that is renamed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    seen: set[str] = set()
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            problem = "occurs twice; keys are unique over a manifest" if row.key in seen else row_problem(row)
            if problem:
                raise ValueError(f"{path}, key {row.key!r} {problem}")
            seen.add(row.key)
            file.write(json.dumps(row_fields(row), ensure_ascii=False) + "\n")
    partial.replace(path)


def read_manifest(path: Path) -> list[Row]:
    """The rows of a manifest file, or of the ``manifest.jsonl`` of a folder; or one ValueError with all problems."""
    path = manifest_path(path)
    rows: list[Row] = []
    problems: list[str] = []
    line_of: dict[str, int] = {}
    with (
        Progress(f"reading {path.name}", path.stat().st_size, "MB", scale=10**6) as progress,
        path.open("rb") as file,
    ):
        for number, line in _lines(file):
            progress.advance(len(line))
            try:
                row = _parse(line)
            except ValueError as error:
                problems.append(f"line {number}: {error}")
                continue
            found = list(_faults(row))
            if line_of.setdefault(row.key, number) != number:
                found.append(f"it is in line {line_of[row.key]}, too, and keys are unique over a manifest")
            where = f"line {number}, key {brief(urllib.parse.unquote(row.key))}"
            problems += [f"{where}: {problem}" for problem in found]
            rows.append(row)
    if len(problems) == 1:
        raise ValueError(f"{path} {problems[0]}")
    if problems:
        more = [f"... and {len(problems) - _SHOWN:,} more"] if len(problems) > _SHOWN else []
        raise ValueError("\n  ".join([f"{path} has {counted(len(problems), 'problem')}:", *problems[:_SHOWN], *more]))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def manifest_path(path: Path) -> Path:
    path = path / "manifest.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no manifest at {path}; `mmmoe-data corpus mini --out DIR` makes one")
    return path


def filter_rows(rows: Iterable[Row], filters: Sequence[str]) -> list[Row]:
    """Rows that match every ``field=value``; values of one field are alternatives."""
    rows = list(rows)
    known = {*FIELDS, *(name for row in rows for name in row.extra)}
    wanted: dict[str, set[str]] = {}
    for item in filters:
        name, separator, value = item.partition("=")
        name = name if name in known else FIELD_ALIASES.get(name, name)
        if not separator or name not in known:
            raise ValueError(f"filter {item!r} is not field=value with a field of {', '.join(sorted(known))}")
        wanted.setdefault(name, set()).add(value)

    def value_of(row: Row, name: str) -> str:
        value = getattr(row, name) if name in FIELDS else row.extra.get(name)
        return "" if value is None else str(value)

    return [row for row in rows if all(value_of(row, name) in values for name, values in wanted.items())]


def files_outside(rows: Iterable[Row], root: Path) -> list[str]:
    """The files of rows outside of ``root``, the manifest's folder."""
    base = os.path.abspath(root)
    named = dict.fromkeys(name for row in rows for name in row.files)
    return [name for name in named if not os.path.abspath(root / name).startswith(base + os.sep)]


def is_inside(name: str, root: Path) -> bool:
    """Whether the file is below ``root``, links resolved: a file that is not decoded could be any file of the
    machine."""
    return os.path.realpath(root / name).startswith(os.path.realpath(root) + os.sep)


def row_problem(row: Row) -> str | None:
    """Why a row cannot be written, as the rest of a sentence, or None."""
    if row.parts is not None:
        try:
            parts_of(row.parts)
        except ValueError as error:
            return f"is not a document: {error}"
    if not row.modalities:
        return "has no image, audio or text"
    if sample_key(urllib.parse.unquote(row.key)) != row.key:
        return "must consist of 0-9, A-Z, a-z, _ and -, and of %XX for the rest"
    fault = next(_faults(row), None)
    return fault and f"has a fault: {fault}"


def _faults(row: Row) -> Iterator[str]:
    if not row.key or len(row.key) > MAX_KEY_BYTES:
        yield f"key has {len(row.key)} bytes with the rest as %XX, and may have 1 to {MAX_KEY_BYTES}"
    if any(has_lone_surrogate(getattr(row, name) or "") for name in FIELDS):
        yield "a text holds half of a character (a lone surrogate)"
    if row.split not in SPLITS:
        yield f"split {brief(row.split)} is not one of {', '.join(SPLITS)} (or {', '.join(SPLIT_ALIASES)})"
    if row.audio_kind not in AUDIO_KINDS:
        yield f"audio_kind {brief(row.audio_kind)} is not speech, effect or empty"
    if row.parts is not None and (row.image or row.audio or row.text):
        yield f"it has {PARTS}, and beside them an image, audio or a text, which belong into them"
    for name in row.files:
        if "\0" in name:
            yield f"path {brief(name)} holds a NUL"
        elif _bytes(name) > MAX_NAME_BYTES or any(_bytes(part) > 255 for part in Path(name).parts):
            yield f"path {brief(name)} is longer than file systems have it"


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, by number; of a line that is too long, only its beginning."""
    number = 0
    while line := file.readline(MAX_META_BYTES + 1):
        number += 1
        rest = line
        while len(rest) > MAX_META_BYTES and not rest.endswith(b"\n"):
            rest = file.readline(MAX_META_BYTES + 1)
        if line.strip():
            yield number, line


def _parse(line: bytes) -> Row:
    values = parse_json(line, "it", MAX_META_BYTES)
    if not isinstance(values, dict):
        raise ValueError(f"it is {type(values).__name__}, not an object")
    use_aliases(values)
    if "key" not in values:
        raise ValueError(f"it has no key (its fields: {', '.join(map(_shown, values)) or 'none'})")
    extra = {name: value for name, value in values.items() if name not in FIELDS}
    parts = extra.pop(PARTS, None)
    try:
        json.dumps([extra, parts], ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ValueError("a field holds NaN, half of a character or too deep a nesting") from None
    plain = {name: _text(values[name], name) for name in FIELDS if values.get(name) is not None}
    problems = [problem for value, problem in plain.values() if problem]
    if problems:
        raise ValueError(f"key {brief(values['key'])}: {'; '.join(problems)}")
    fields = {name: value for name, (value, _) in plain.items()}
    try:
        fields["key"] = sample_key(fields.get("key", ""))
    except UnicodeEncodeError:
        raise ValueError(f"key {brief(values['key'])} holds half of a character (a lone surrogate)") from None
    if not fields.get("split"):
        fields["split"] = "train"
    fields["split"] = split_called(fields["split"])
    return Row(**fields, parts=parts, extra=extra)


def _text(value: object, name: str) -> tuple[str, str]:
    """A field's value as a string, or what is wrong with it. A number may be a key or a label, no text or file."""
    if isinstance(value, str):
        return value, ""
    if name not in _CONTENT and isinstance(value, int) and not isinstance(value, bool):
        return str(value), ""
    return "", f"{name} must be a string or null, and is {brief(value)}"


def _bytes(name: str) -> int:
    return len(name.encode("utf-8", "surrogatepass"))


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 80 else brief(name)
