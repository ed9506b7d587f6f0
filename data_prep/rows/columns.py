"""Which column of a table holds what: by ``--column FIELD=COLUMN``, else by the names that people use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from mmmoe_pretrain.data.sources.listing import is_remote
from mmmoe_pretrain.data_prep.rows.documents import PARTS
from mmmoe_pretrain.data_prep.rows.fields import foreign_row, in_utf_8, path_key
from mmmoe_pretrain.data_prep.rows.refs import Ref, file_name, printable
from mmmoe_pretrain.data_prep.rows.row import CONTENT, FIELDS, SPLITS, Row, kinds_of_files, sample_key, split_called
from mmmoe_pretrain.limits import FIELD_ALIASES
from mmmoe_pretrain.modalities import format_of
from mmmoe_pretrain.untrusted import brief
from mmmoe_pretrain.urls import join, local_path, redacted

# Field -> names of its column, the preferred ones first; upper case, spaces and hyphens make no difference.
KNOWN: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "picture", "photo", "image_path", "image_file", "image_filename", "image_file_name",
              "img_path", "image_url", "img_url", "jpg", "jpeg", "png", "webp"),
    "audio": ("audio", "audio_path", "audio_file", "audio_filename", "audio_file_name", "audio_filepath", "audio_url",
              "wav", "flac", "mp3", "wav_path", "speech", "sound"),
    "text": ("text", "caption", "transcript", "transcription", "sentence", "normalized_text", "raw_text", "prompt",
             "description", "alt_text", "alt"),
    "key": ("key", "__key__", "id", "uid", "uuid", "sample_id"),
    "label": ("label", "class", "category", "class_name", "label_name"),
    "language": ("language", "lang", "locale"),
}  # fmt: skip
# Columns that hold a file or URL of any kind, which its suffix tells; taken where no column is known to hold images
# or audio.
OF_FILES = ("file_name", "filename", "file", "path", "filepath", "file_path", "url", "uri", "link")
FILE = "file"  # as a field of ``--column``: a column of OF_FILES
_OURS = (*FIELDS, PARTS)
_BRACES = re.compile(r"\{([^{}]+)\}")


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """``image=URL`` as a field and the column that holds it; ``text=`` as one that none does."""
    found: dict[str, str] = {}
    fields = (*FIELDS, FILE, *kinds_of_files())
    for item in given:
        name, separator, column = item.partition("=")
        name = FIELD_ALIASES.get(name, name)
        if not separator or name not in fields:
            raise ValueError(f"--column {item} is not FIELD=COLUMN with a field of {', '.join(fields)}")
        if name in found:
            raise ValueError(f"--column names {name} twice; give one column for it")
        found[name] = column
    return found


@dataclass(frozen=True, slots=True)
class Columns:
    """``fields``: field -> its column, or a pattern such as ``wavs/{id}.wav`` of columns. ``labels``: the names of
    classes that are numbers in the table, by column. ``folder``: of the table, below the root or as a URL."""

    fields: Mapping[str, str]
    of_files: tuple[str, ...] = ("image", "audio", FILE)  # fields that hold files
    folder: str = ""
    split: str = ""  # of rows that name none, as ``subset``
    subset: str = ""
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    suffixes: Mapping[str, str] = field(default_factory=dict)  # of what columns with bytes hold, by the first row
    declined: frozenset[str] = frozenset()  # fields that no column holds, as the user says

    def note(self) -> str:
        """What was taken for what."""
        taken = ", ".join(f"{name} from {printable(column)[:80]}" for name, column in self.fields.items())
        return f"{taken}; other columns are kept in KEY.json (--column FIELD=COLUMN chooses others)"

    def row(self, values: Mapping[str, Any], number: int, cells: Mapping[str, Ref | None] | None = None) -> Row:
        """The row of a line; ``number``: of it in the input; ``cells``: what columns with bytes hold. Raises
        ValueError."""
        rest = dict(values)
        cells = {name: self._ref(name, ref) if isinstance(ref, str) else ref for name, ref in (cells or {}).items()}
        taken = {name: self._value(column, values) for name, column in self.fields.items() if column not in cells}
        for column in self.fields.values():
            rest.pop(column, None)
        files = {name: self._ref(name, taken.pop(name, None)) for name in self.of_files}
        for name, column in self.fields.items():
            if column in cells:
                files[name] = cells.pop(column)
        members: dict[str, Ref] = {}
        own = {name: files.pop(name) for name in ("image", "audio")}
        for name, ref in files.items():
            if ref is not None:
                kind, suffix = _kind_of(name, ref)
                if kind in own:
                    own[kind] = ref
                else:
                    members[suffix] = ref
        for column, cell in cells.items():
            if cell is None:
                continue
            name = f"{_as_extension(column)}.{_suffix(cell) or self.suffixes.get(column, 'bin')}"
            if name in members:
                raise ValueError(f"the files of two columns would be KEY.{name}; rename column {brief(column)}")
            members[name] = cell
        return self._row(taken, rest, number, own, members)

    def _row(
        self, taken: dict[str, Any], rest: dict[str, Any], number: int, own: dict[str, Ref | None],
        members: dict[str, Ref],
    ) -> Row:  # fmt: skip
        image, audio = own["image"], own["audio"]
        path = next((ref for ref in (image, audio, *members.values()) if isinstance(ref, str)), None)
        for ref in (image, audio):
            if isinstance(ref, str) and is_remote(ref):
                rest.setdefault("url", redacted(ref))  # where it came from, without what grants access
        name = taken.pop("key", None)
        if isinstance(name, float | bool | list | dict):
            raise ValueError(f"key must be a string or an integer, and is {brief(name)}")
        if name not in (None, ""):
            key = sample_key(in_utf_8(str(name)))
        elif path and "key" not in self.declined and not is_remote(path):
            key = path_key(str(PurePosixPath(path).with_suffix("")))
        else:
            key = f"{number:09d}"
            if "key" in self.declined and path:  # several rows may name one file, and then belong together
                taken.setdefault("group", path_key(path))
        names, label = self.labels.get(self.fields.get("label", "")), taken.get("label")
        if names and isinstance(label, int) and 0 <= label < len(names):
            taken["label"] = names[label]
        for field_name, value in taken.items():
            if not isinstance(value, str | None) and (field_name == "text" or not _is_int(value)):
                raise ValueError(
                    f"{field_name} must be a string or null, and is {brief(value)}; --column {field_name}= takes no "
                    f"column for it"
                )
        split = taken.get("split")
        if split not in (None, "") and split_called(str(split)) not in SPLITS:
            raise ValueError(f"split {brief(split)} is not one of {', '.join(SPLITS)}; --column split= takes none")
        if PARTS in rest and not (image or audio or members or taken.get("text")):
            taken[PARTS] = rest.pop(PARTS)
        taken["subset"] = taken.get("subset") or self.subset
        fields = {name: value for name, value in taken.items() if value is not None and value != ""}
        others = {f"original_{name}" if self._is_ours(name) else name: value for name, value in rest.items()}
        return foreign_row(fields, key, self.split, image, audio, members, others)

    def _is_ours(self, name: str) -> bool:
        """Whether a field of this name would be read as one that the column is not taken for."""
        return name in _OURS or FIELD_ALIASES.get(name) in self.declined

    def _value(self, column: str, values: Mapping[str, Any]) -> Any:
        if column in values or not _BRACES.search(column):
            return values.get(column)
        found = [values.get(name) for name in _BRACES.findall(column)]
        if None in found or "" in found:
            return None
        return _BRACES.sub(lambda match: str(values[match[1]]), column)

    def _ref(self, name: str, value: Any) -> Ref | None:
        """The path below the root, or the URL."""
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            value = value["path"]  # as Hugging Face's datasets have a file
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a path or URL, and is {brief(value)}")
        value = local_path(value.strip())
        if is_remote(value) or not self.folder:
            return value
        return join(self.folder, value) if is_remote(self.folder) else str(PurePosixPath(self.folder) / value)


def choose(
    names: Sequence[str], given: Mapping[str, str], where: str, kinds: Mapping[str, str] | None = None
) -> Columns:
    """The columns of a table that has these ``names``. ``given``: of ``--column``; ``kinds``: of columns whose type
    tells what they hold. Raises ValueError where the content cannot be told."""
    fields: dict[str, str] = {}
    by_name = {_simple(name): name for name in reversed(names)}
    for name, column in given.items():
        if column:
            fields[name] = _found(name, column, names, where)
    free = [name for name in by_name.values() if name not in fields.values()]
    by_rank = sorted((kinds or {}).items(), key=lambda item: _rank(*item))
    for column, kind in by_rank:
        if kind not in fields and kind not in given and column not in fields.values():
            fields[kind] = column
    for name in (*KNOWN, *FIELDS, *kinds_of_files()):
        if name not in given and name not in fields:
            known = (by_name.get(each) for each in (*KNOWN.get(name, (name,)), *_aliases(name)))
            taken = next((each for each in known if each in free and each not in fields.values()), None)
            if taken is not None:
                fields[name] = taken
    if FILE not in given and not fields.keys() & {"image", "audio"} and "image" not in given:
        named = next((by_name[each] for each in OF_FILES if by_name.get(each) in free), None)
        if named is not None and named not in fields.values():
            fields[FILE] = named
    if not fields.keys() & {*CONTENT, FILE, *kinds_of_files()} and PARTS not in names:
        raise ValueError(
            f"{where} has the columns {_listed(names)}, and none has a name that is known to hold images, audio or "
            f"texts; say which does: --column image=NAME, --column audio=NAME or --column text=NAME (the first line "
            f"of a CSV or TSV names its columns)"
        )
    declined = frozenset(name for name, column in given.items() if not column)
    return Columns(fields, ("image", "audio", FILE, *kinds_of_files()), declined=declined)


def _found(field_name: str, column: str, names: Sequence[str], where: str) -> str:
    """``column`` as the table spells it."""
    if column in names:
        return column
    same = [name for name in names if name.casefold() == column.casefold()]
    if len(same) == 1:
        return same[0]
    missing = [name for name in _BRACES.findall(column) if name not in names]
    if _BRACES.search(column) and not missing:
        return column
    what = missing[0] if missing else column
    raise ValueError(f"--column {field_name}={column}: {where} has no column {what}, but {_listed(names)}")


def is_known(name: str) -> bool:
    """Whether a column of this name is taken for a file or text."""
    return _simple(name) in (*KNOWN["image"], *KNOWN["audio"], *KNOWN["text"], *OF_FILES)


def _as_extension(column: str) -> str:
    return re.sub(r"[^0-9a-z_-]+", "-", column.lower())


def _simple(name: str) -> str:
    return re.sub(r"[ -]+", "_", name.strip().lower())


def _rank(column: str, kind: str) -> int:
    """By which the columns of a kind are preferred: that named ``image`` before ``mask``."""
    known = KNOWN.get(kind, ())
    return known.index(_simple(column)) if _simple(column) in known else len(known)


def _aliases(name: str) -> list[str]:
    return [alias for alias, field_name in FIELD_ALIASES.items() if field_name == name]


def _listed(names: Sequence[str], most: int = 30) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(brief(name)[1:-1] or "(no name)" for name in names[:most]) + more


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _suffix(ref: Ref) -> str:
    return PurePosixPath(file_name(ref)).suffix[1:].lower()


def _kind_of(name: str, ref: Ref) -> tuple[str, str]:
    """The kind of a file in field ``name``, and its suffix."""
    suffix = _suffix(ref)
    kind = format_of(suffix)
    if name != FILE and kind not in (None, name):
        raise ValueError(f"{name}: {brief(file_name(ref))} is {kind}")
    if kind == "text":
        raise ValueError(f"{brief(file_name(ref))} is a text, which belongs into a column of texts")
    if kind is None and isinstance(ref, str) and is_remote(ref):
        return "image", suffix
    if kind is None:
        raise ValueError(f"{brief(file_name(ref))} is of no format that is read; --column image=NAME, if it is one")
    return kind, suffix
