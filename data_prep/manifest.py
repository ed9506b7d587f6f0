"""Rows of ``manifest.jsonl``: their schema, reading, writing and filtering.

Owns what a row may hold (docs/data_format.md); knows nothing of where the files come from.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmmoe_pretrain.limits import MAX_KEY_BYTES, MAX_META_BYTES, MAX_NAME_BYTES
from mmmoe_pretrain.untrusted import brief, parse_json

SPLITS = ("train", "val", "test")
AUDIO_KINDS = ("", "speech", "effect")
_KEY = re.compile(r"[0-9a-z_-]+")


@dataclass(frozen=True, slots=True)
class Row:
    """One sample: any non-empty subset of an image, a sound and a text."""

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

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(name for name in ("image", "audio", "text") if getattr(self, name))


FIELDS = tuple(field.name for field in dataclasses.fields(Row))


def sample_fields(row: Row) -> dict[str, str]:
    """What ``KEY.json`` holds: the row without its paths and its text."""
    return {name: getattr(row, name) for name in FIELDS if name not in ("image", "audio", "text")}


def slug(text: str) -> str:
    """``text`` in the alphabet of keys: ``[0-9a-z_-]``."""
    return re.sub(r"[^0-9a-z_]+", "-", text.lower()).strip("-")


def write_manifest(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows at once, under a temporary name until they are whole."""
    _check_unique(rows, str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            problem = row_problem(row)
            if problem:
                raise ValueError(f"row {row.key!r}: {problem}")
            file.write(json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n")
    partial.replace(path)


def read_manifest(path: Path) -> list[Row]:
    """The rows of a manifest file, or of the ``manifest.jsonl`` of a folder."""
    path = manifest_path(path)
    rows = []
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(MAX_META_BYTES + 1), b"")
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_parse(line, f"{path} line {number}"))
    if not rows:
        raise ValueError(f"{path} has no rows")
    _check_unique(rows, str(path))
    return rows


def manifest_path(path: Path) -> Path:
    path = path / "manifest.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no manifest at {path}; `mmmoe-data corpus mini --out DIR` makes one")
    return path


def filter_rows(rows: Iterable[Row], filters: Sequence[str]) -> list[Row]:
    """Rows that match every ``field=value``; values of one field are alternatives."""
    wanted: dict[str, set[str]] = {}
    for item in filters:
        name, separator, value = item.partition("=")
        if not separator or name not in FIELDS:
            raise ValueError(f"filter {item!r} is not field=value with a field of {', '.join(FIELDS)}")
        wanted.setdefault(name, set()).add(value)
    return [row for row in rows if all((getattr(row, name) or "") in values for name, values in wanted.items())]


def row_problem(row: Row) -> str | None:
    """Why a row breaks the format, or None."""
    if not _KEY.fullmatch(row.key) or len(row.key) > MAX_KEY_BYTES:
        return f"key must consist of at most {MAX_KEY_BYTES} of 0-9, a-z, _ and -"
    if any("\ud800" <= letter <= "\udfff" for name in FIELDS for letter in getattr(row, name) or ""):
        return "a text holds half of a character (a lone surrogate)"
    if not row.modalities:
        return "no image, audio or text"
    if row.split not in SPLITS:
        return f"split {brief(row.split)} is not one of {', '.join(SPLITS)}"
    if row.audio_kind not in AUDIO_KINDS:
        return f"audio_kind {brief(row.audio_kind)} is not speech, effect or empty"
    for name in (row.image, row.audio):
        if name and (Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name):
            return f"path {brief(name)} leaves the manifest's folder"
        if name and (len(name.encode()) > MAX_NAME_BYTES or any(len(p.encode()) > 255 for p in Path(name).parts)):
            return f"path {brief(name)} is longer than file systems have it"
    return None


def _parse(line: bytes, where: str) -> Row:
    values = parse_json(line, where, MAX_META_BYTES)
    if not isinstance(values, dict) or "key" not in values:
        raise ValueError(f"{where} is not an object with a key")
    unknown = sorted(set(values) - set(FIELDS))
    if unknown:
        raise ValueError(f"{where}: unknown field {', '.join(map(_shown, unknown))}; known: {', '.join(FIELDS)}")
    wrong = [name for name, value in values.items() if not isinstance(value, str | None)]
    if wrong:
        raise ValueError(f"{where}: {', '.join(wrong)} must be a string or null")
    optional = ("image", "audio", "text")
    row = Row(**{name: value if name in optional else value or "" for name, value in values.items()})
    problem = row_problem(row)
    if problem:
        raise ValueError(f"{where}, key {brief(row.key)}: {problem}")
    return row


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 80 else brief(name)


def _check_unique(rows: Iterable[Row], where: str) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.key in seen:
            raise ValueError(f"{where}: key {row.key!r} occurs twice; keys are unique over a manifest")
        seen.add(row.key)
