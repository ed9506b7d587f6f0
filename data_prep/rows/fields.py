"""The fields of samples that others made: a row takes those that it knows, and the rest travels as plain JSON."""

from __future__ import annotations

import dataclasses
import datetime
import math
import numbers
import os
import urllib.parse
from collections.abc import Mapping
from typing import Any

from mmmoe_pretrain.data_prep.rows.documents import NONE, PARTS
from mmmoe_pretrain.data_prep.rows.refs import Ref
from mmmoe_pretrain.data_prep.rows.row import AUDIO_KINDS, CONTENT, FIELDS, SPLITS, Row, faults, split_called
from mmmoe_pretrain.limits import use_aliases
from mmmoe_pretrain.untrusted import brief

_FILES = ("key", "image", "audio")  # which a sample's own fields don't name
MAX_DEPTH = 40  # of a field's value
_AUDIO = (b"fLaC", "flac"), (b"OggS", "ogg"), (b"ID3", "mp3")
_IMAGES = (
    (b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"II*\0", "tif"),
    (b"MM\0*", "tif"),
)  # fmt: skip


def path_key(name: str) -> str:
    """The key of the file ``name``, which may hold bytes that are no UTF-8: ``os.fsdecode(unquote_to_bytes(key))``
    gives it back."""
    return _quoted(os.fsencode(name))


def kept_key(key: str) -> str:
    """``key`` where it is one already, else as one."""
    same = _quoted(urllib.parse.unquote_to_bytes(key)) == key
    return key if same else _quoted(key.encode())


def _quoted(name: bytes) -> str:
    return urllib.parse.quote(name, safe="").replace(".", "%2E").replace("~", "%7E")


def in_utf_8(text: str) -> str:
    """``text`` with ``\\udce9`` in the place of half of a character."""
    return text.encode("utf-8", "backslashreplace").decode()


def format_by_start(data: bytes) -> str:
    """The extension of an image or a clip of audio by its first bytes; empty where it is neither."""
    if data[:4] == b"RIFF":
        return {b"WEBP": "webp", b"WAVE": "wav"}.get(data[8:12], "")
    found = next((name for start, name in (*_AUDIO, *_IMAGES) if data.startswith(start)), "")
    return found or ("mp3" if len(data) > 1 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 else "")


def foreign_row(
    values: Mapping[str, Any],
    key: str,
    split: str = "",
    image: Ref | None = None,
    audio: Ref | None = None,
    members: Mapping[str, Ref] = NONE,
    extra: Mapping[str, Any] = NONE,
) -> Row:
    """The row of a sample with these fields, by their names or aliases, and files. ``key``: in the alphabet of keys;
    ``split``: unless the fields name one; ``extra``: further fields, whatever their names. A known field with a value
    of another type becomes ``original_NAME``."""
    fields = dict(values)
    for name in [name for name in FIELDS if name not in _FILES and not _fits(name, fields.get(name, ""))]:
        fields[f"original_{name}"] = fields.pop(name)
    use_aliases(fields)
    known: dict[str, Any] = {}
    for name in FIELDS:
        value = fields.pop(name, None)
        if value is None or value == "" or (name == "key" and value in (key, urllib.parse.unquote(key))):
            continue
        if _fits(name, value):
            known[name] = split_called(value) if name == "split" else str(value)
        else:
            fields[f"original_{name}"] = value
    parts = fields.pop(PARTS, None)
    if not isinstance(parts, list | None):
        fields[f"original_{PARTS}"], parts = parts, None
    known = {"split": split, **known, "key": key, "image": image, "audio": audio}
    others = {in_utf_8(name): plain(value) for name, value in (*fields.items(), *extra.items())}
    return Row(**known, parts=parts, members=members, extra=others)


def _fits(name: str, value: Any) -> bool:
    if name in _FILES:
        return False
    if value is None or value == "":
        return True
    if name == "split":
        return isinstance(value, str) and split_called(value) in SPLITS
    if name == "audio_kind":
        return isinstance(value, str) and value in AUDIO_KINDS
    return isinstance(value, str) or (name not in CONTENT and isinstance(value, int) and not isinstance(value, bool))


def plain(value: Any, depth: int = 0) -> Any:
    """``value`` as JSON has it: dates in ISO 8601, decimals as strings, what is not a number as null."""
    if depth > MAX_DEPTH:
        raise ValueError(f"a field is nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return in_utf_8(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {in_utf_8(str(name)): plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item, depth + 1) for item in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return brief(value)
    if isinstance(value, numbers.Number) and hasattr(value, "item"):  # numpy's
        return plain(value.item(), depth + 1)
    return str(value)


def sound(row: Row) -> Row:
    """The row of a sample that others made; a broken one where a field breaks a rule, since one sample among many is
    no reason to refuse all."""
    problem = next(faults(row), None)
    return row if problem is None or row.problem else with_problem(Row(row.key, split=row.split), problem)


def with_problem(row: Row, problem: str) -> Row:
    """A row that becomes a broken sample."""
    return dataclasses.replace(row, problem=problem, parts=None, members={})
