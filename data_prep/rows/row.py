"""A row: one sample before it is written. Its fields, their rules, and its key.

Rows come from ``manifest.py``, tables, folders and archives; the parts of a document are in ``documents.py``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mmmoe_pretrain.data.sources.listing import is_remote
from mmmoe_pretrain.data_prep.rows.documents import PARTS, Part, members_named, parts_of
from mmmoe_pretrain.data_prep.rows.refs import Ref, file_name, ref_from, shown
from mmmoe_pretrain.limits import MAX_KEY_BYTES, MAX_NAME_BYTES, has_lone_surrogate, has_text, use_aliases
from mmmoe_pretrain.modalities import format_of, reads
from mmmoe_pretrain.progress import counted
from mmmoe_pretrain.untrusted import brief

SPLITS = ("train", "val", "test")
AUDIO_KINDS = ("", "speech", "effect")
SPLIT_ALIASES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}
CONTENT = ("image", "audio", "text")
MOST_SHOWN = 20  # faults


class Fault(NamedTuple):
    """What is no row, where: ``line 3``."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class Row:
    """One sample: any non-empty subset of an image, a clip of audio, a text and other files, or a document of
    ``parts``. ``members``: its other files by their extension, which are copied as they are; where the row is
    ``copied``, all of its files, and nothing is added to them. ``split``: "" is decided where the row is written."""

    key: str
    image: Ref | None = None
    audio: Ref | None = None
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
    members: Mapping[str, Ref] = field(default_factory=dict, hash=False)
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)  # fields of other names
    copied: bool = False
    problem: str = ""  # why it is a broken sample, as the reading of its input found

    @property
    def modalities(self) -> tuple[str, ...]:
        """The kinds of its content; none for a damaged document."""
        if self.parts is not None:
            held = {part.name for part in self._parts if part.path or has_text(part.text or "")}
        else:
            held = {"image"} if self.image else set()
            held |= {"audio"} if self.audio else set()
            held |= {"text"} if has_text(self.text or "") else set()
            held |= {kind for kind in map(format_of, self.members) if kind}
        return (*(name for name in CONTENT if name in held), *sorted(held.difference(CONTENT)))

    @property
    def files(self) -> tuple[Ref, ...]:
        """All files of it."""
        own: tuple[Ref | None, ...] = (self.image, self.audio)
        return (
            *(ref for ref in own if ref),
            *(part.path for part in self._parts if part.path),
            *(self.members.values() if self.parts is None else ()),
        )

    @property
    def urls(self) -> list[str]:
        """Of the files that are downloaded."""
        return [ref for ref in self.files if isinstance(ref, str) and is_remote(ref)]

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.text, *(part.text for part in self._parts))))

    @property
    def _parts(self) -> list[Part]:
        try:
            return [] if self.parts is None else parts_of(self.parts, self.members)
        except ValueError:
            return []


NOT_FIELDS = (PARTS, "members", "extra", "copied", "problem")
FIELDS = tuple(field.name for field in dataclasses.fields(Row) if field.name not in NOT_FIELDS)
_TEXTS = tuple(name for name in FIELDS if name not in ("image", "audio"))


class Found(NamedTuple):
    """A row, and where it is in its input."""

    where: str
    row: Row


@dataclass(slots=True)
class Faults:
    """What was wrong with the rows of an input; the first ones by name."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.count += 1
        if len(self.shown) < MOST_SHOWN:
            self.shown.append(f"{where}: {reason}")

    def refuse(self, what: str) -> None:
        """Raise one ValueError with all of them, if there are any."""
        if self.count == 1:
            raise ValueError(f"{what} {self.shown[0]}")
        if self.count:
            more = [f"... and {self.count - MOST_SHOWN:,} more"] if self.count > MOST_SHOWN else []
            raise ValueError("\n  ".join([f"{what} has {counted(self.count, 'problem')}:", *self.shown, *more]))


def row_fields(row: Row) -> dict[str, Any]:
    """The fields of a row's line in a manifest."""
    document = {} if row.parts is None else {PARTS: row.parts}
    values = {name: getattr(row, name) for name in FIELDS}
    return {**values, "key": urllib.parse.unquote(row.key), **document, **row.extra}


def sample_fields(row: Row) -> dict[str, Any]:
    """The content of ``KEY.json``: the row without its paths and its text."""
    return {**{name: getattr(row, name) for name in FIELDS if name not in CONTENT}, **row.extra}


def sample_key(name: str) -> str:
    """``name`` in the alphabet of keys, ``[0-9A-Za-z_-]`` and %XX; ``urllib.parse.unquote`` decodes it.

    A dot would end the key, and a slash make a folder, where members of a tar are named by it.
    """
    return urllib.parse.quote(name, safe="").replace(".", "%2E").replace("~", "%7E")


def split_called(name: str) -> str:
    """``val`` for ``Validation``; a name that is not a split's, in lower case."""
    return SPLIT_ALIASES.get(name.lower(), name.lower())


def split_order(name: str) -> tuple[int, str]:
    """By which splits are sorted: train, val, test, others."""
    return SPLITS.index(name) if name in SPLITS else len(SPLITS), name


def slug(text: str) -> str:
    """``text`` in ``[0-9a-z_-]``, for keys that are made here."""
    return re.sub(r"[^0-9a-z_]+", "-", text.lower()).strip("-")


def is_outside(ref: Ref, root: Path) -> bool:
    """Whether a path leads out of ``root``, the folder of the rows."""
    if not isinstance(ref, str) or is_remote(ref):
        return False
    return not os.path.abspath(root / ref).startswith(os.path.abspath(root) + os.sep)


def is_inside(ref: Ref, root: Path) -> bool:
    """Whether the file is below ``root``, links resolved, or in an archive or at a URL: a file that is not decoded
    could be any file of the machine."""
    if not isinstance(ref, str) or is_remote(ref):
        return True
    return os.path.realpath(root / ref).startswith(os.path.realpath(root) + os.sep)


def require_inside(ref: Ref, root: Path, where: str = "") -> None:
    """Raise ValueError where a file that is not decoded is outside of ``root``; ``where``: how the message begins."""
    if not is_inside(ref, root):
        raise ValueError(
            f"{where}{shown(ref)} lies outside of the folder of the rows, and only images and audio are taken from "
            f"there; copy it into the folder (cp -rL copies what links lead to)"
        )


def row_problem(row: Row) -> str | None:
    """Why a row cannot be written, as the rest of a sentence, or None."""
    if row.parts is not None:
        try:
            parts_of(row.parts, row.members)
        except ValueError as error:
            return f"is not a document: {error}"
    if not row.modalities:
        return "has no image, audio or text"
    if sample_key(urllib.parse.unquote(row.key)) != row.key:
        return "must consist of 0-9, A-Z, a-z, _ and -, and of %XX for the rest"
    fault = next(faults(row), None)
    return fault and f"has a fault: {fault}"


def faults(row: Row) -> Iterator[str]:
    """What of a row breaks a rule."""
    if not row.key or len(row.key) > MAX_KEY_BYTES:
        yield f"key has {len(row.key)} bytes with the rest as %XX, and may have 1 to {MAX_KEY_BYTES}"
    if any(has_lone_surrogate(value) for name in _TEXTS if isinstance(value := getattr(row, name), str)):
        yield "a text holds half of a character (a lone surrogate)"
    if row.split and row.split not in SPLITS:
        yield f"split {brief(row.split)} is not one of {', '.join(SPLITS)} (or {', '.join(SPLIT_ALIASES)})"
    if row.audio_kind not in AUDIO_KINDS:
        yield f"audio_kind {brief(row.audio_kind)} is not speech, effect or empty"
    if row.parts is not None and (
        row.image or row.audio or row.text or row.members.keys() - members_named(row.parts)
    ):
        yield f"it has {PARTS}, and beside them an image, audio or a text, which belong into them"
    for ref in row.files:
        path = ref if isinstance(ref, str) else ref.path
        if "\0" in path:
            yield f"path {brief(path)} holds a NUL"
        elif not _is_name(path):
            yield f"path {brief(path)} holds half of a character (a lone surrogate)"
        elif not is_remote(path) and (
            _bytes(path) > MAX_NAME_BYTES or any(_bytes(x) > 255 for x in Path(path).parts)
        ):
            yield f"path {brief(path)} is longer than file systems have it"


def row_of(values: dict[str, Any], split: str = "train") -> Row:
    """The row with these fields, by their names or aliases; ``split``: where it has none. A file of another kind
    than image and audio stands in a field of the name of its kind. Raises ValueError."""
    use_aliases(values)
    if "key" not in values:
        raise ValueError(f"it has no key (its fields: {', '.join(map(_shown, values)) or 'none'})")
    members = _other_files(values)
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
    fields["split"] = split_called(fields.get("split") or split)
    return Row(**fields, parts=parts, members=members, extra=extra, copied=False)


def _other_files(values: dict[str, Any]) -> dict[str, Ref]:
    """The files in fields of the names of other kinds, by their extension; taken out of ``values``."""
    found: dict[str, Ref] = {}
    for name in kinds_of_files():
        value = values.get(name)
        if isinstance(value, str) and format_of(suffix := PurePosixPath(file_name(value)).suffix[1:].lower()) == name:
            found[suffix] = values.pop(name)
    return found


def kinds_of_files() -> tuple[str, ...]:
    """The kinds of modality, beside image and audio, that are files."""
    from mmmoe_pretrain import kinds

    return tuple(name for name in kinds.MODALITIES.names if name not in CONTENT and not reads(name).field)


def row_to_json(row: Row) -> bytes:
    """A row with its refs, for ``row_from_json``."""
    values = {name: value for name in FIELDS if (value := getattr(row, name))}
    if row.parts is not None:
        values[PARTS] = row.parts
    if row.members:
        values |= {"members": dict(row.members), "copied": row.copied}
    if row.problem:
        values["problem"] = row.problem
    return json.dumps([values, row.extra]).encode()


def row_from_json(data: bytes) -> Row:
    values, extra = json.loads(data)
    for name in ("image", "audio"):
        if name in values:
            values[name] = ref_from(values[name])
    members = {name: ref_from(value) for name, value in values.pop("members", {}).items()}
    return Row(**{"split": "", **values}, members=members, extra=extra)


def _text(value: object, name: str) -> tuple[str, str]:
    """A field's value as a string, or what is wrong with it. A number may be a key or a label, no text or file."""
    if isinstance(value, str):
        return value, ""
    if name not in CONTENT and isinstance(value, int) and not isinstance(value, bool):
        return str(value), ""
    return "", f"{name} must be a string or null, and is {brief(value)}"


def _is_name(path: str) -> bool:
    """Whether files may be called so: in UTF-8, or with bytes that Python stands surrogates for."""
    try:
        return bool(os.fsencode(path) if not is_remote(path) else path.encode())
    except UnicodeEncodeError:
        return False


def _bytes(name: str) -> int:
    return len(name.encode("utf-8", "surrogatepass"))


def _shown(name: str) -> str:
    return name if name.isprintable() and len(name) < 80 else brief(name)
