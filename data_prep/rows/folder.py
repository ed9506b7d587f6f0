"""A folder of files as rows: the files of one name, suffixes aside, in one folder are one sample.

``a.jpg``, ``a.wav`` with ``a.txt``, ``a.caption``, ``a.lab`` or ``a.json``; transcripts of LibriSpeech
(``*.trans.txt``); folders ``train``, ``val`` and ``test`` as splits; folders as classes, where they hold images or
audio without texts. The same rules hold for what is in a zip (``archives.py``).
"""

from __future__ import annotations

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmmoe_pretrain.data.sources.members import META
from mmmoe_pretrain.data_prep.rows.documents import PARTS
from mmmoe_pretrain.data_prep.rows.fields import foreign_row, path_key, sound, with_problem
from mmmoe_pretrain.data_prep.rows.refs import Reader, Ref, printable, shown
from mmmoe_pretrain.data_prep.rows.row import SPLITS, Found, Row, require_inside, split_called
from mmmoe_pretrain.data_prep.rows.walk import Folder
from mmmoe_pretrain.limits import MAX_META_BYTES, MAX_TEXT_BYTES, has_text
from mmmoe_pretrain.modalities import format_of
from mmmoe_pretrain.progress import Progress, counted
from mmmoe_pretrain.untrusted import MAX_JSON_BYTES, parse_json

TEXTS = ("txt", "text", "caption", "lab")  # suffixes of texts beside an image or audio, the preferred one first
TRANSCRIPTS = ".trans.txt"
MEDIA = ("image", "audio")
# Names of folders that say what kind of files they hold, not which class.
NO_CLASSES = frozenset(
    ["image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "audio", "audios", "wav", "wavs",
     "sound", "sounds", "speech", "clip", "clips", "text", "texts", "caption", "captions", "label", "labels", "data",
     "files"]
)  # fmt: skip
LABEL = "folder"  # ``--column label=folder``

Folders = Callable[[Counter[str]], Iterator[Folder]]


@dataclass(slots=True)
class _Survey:
    """What a walk over all files found."""

    files: int = 0
    media: int = 0
    texts: int = 0
    others: int = 0  # of other formats that are read
    ignored: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)  # by suffix
    classes: set[str] = field(default_factory=set)
    has_classes: bool = True  # so far, all content lies in a folder of the first level


def folder_rows(
    folders: Folders, root: Path, given: Mapping[str, str], notes: list[str], where: str
) -> Iterator[Found]:
    """The rows of a tree of files, which is walked twice; ``root``: of their refs."""
    if given.keys() - {"label"} or given.get("label", LABEL) not in ("", LABEL):
        raise ValueError(
            f"{where} is a folder of files, which has no columns but the label: --column label={LABEL} takes folders "
            f"as classes, and --column label= takes none"
        )
    survey = _surveyed(folders, given)
    if not survey.media + survey.texts + survey.others:
        found = ", ".join(f"{n:,} *{suffix}" for suffix, n in survey.unknown.most_common(5))
        raise ValueError(f"{where} holds no image, audio or text ({found or 'no files'})")
    work = _Work(root, survey)
    with Progress(f"reading {where}", survey.files, "files") as progress:
        for path, files in folders(Counter()):
            yield from work.rows(path, files)
            progress.advance(len(files))
    notes += [f"{where}: {note}" for note in work.notes()]


def _surveyed(folders: Folders, given: Mapping[str, str]) -> _Survey:
    survey = _Survey()
    depths: dict[str, bool] = {"media": True, "texts": True}
    classes: dict[str, set[str]] = {"media": set(), "texts": set()}
    for path, files in folders(survey.ignored):
        survey.files += len(files)
        kinds = Counter(_role(name) for name in files)
        survey.media += kinds["media"]
        survey.texts += kinds["texts"]
        survey.others += kinds["others"]
        if kinds["unknown"]:
            survey.unknown.update(_suffix(name) for name in files if _role(name) == "unknown")
        parts = _below_split(path)[1]
        for role in depths:
            if kinds[role]:
                depths[role] &= len(parts) == 1
                classes[role].update(parts[:1])
    role = "media" if survey.media else "texts"
    survey.classes = classes[role] if "label" not in given else set()  # for the note, unless the user decided
    survey.has_classes = given.get("label") == LABEL or (
        "label" not in given
        and depths[role] and len(classes[role]) > 1 and not (survey.media and survey.texts)
        and not NO_CLASSES & {name.lower() for name in classes[role]}
    )  # fmt: skip
    return survey


@functools.lru_cache(1024)
def _role_of(suffix: str) -> str:
    kind = format_of(suffix)
    if kind in MEDIA:
        return "media"
    if kind == "text" or suffix in (*TEXTS, META):
        return "texts"
    return "others" if kind else "unknown"


def _role(name: str) -> str:
    return _role_of(_suffix(name))


def _suffix(name: str) -> str:
    return printable(os.path.splitext(name)[1][1:].lower())


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _below_split(path: str) -> tuple[str, list[str]]:
    """The split of a folder, by the first one above it, and the folders below that."""
    parts = path.split("/") if path else []
    split = split_called(parts[0]) if parts else ""
    return (split, parts[1:]) if split in SPLITS else ("", parts)


class _Work:
    """Makes rows, folder by folder, and counts what is in none."""

    def __init__(self, root: Path, survey: _Survey) -> None:
        self._root, self._reader, self._survey = root, Reader(root), survey
        self._alone: list[str] = []  # the first text without an image or audio
        self._alone_count = self._twins = 0

    def rows(self, path: str, files: dict[str, Ref]) -> Iterator[Found]:
        """The rows of one folder."""
        split, parts = _below_split(path)
        label = printable(parts[-1]) if self._survey.has_classes and parts else ""
        transcripts = self._transcripts(files)
        samples: dict[str, list[str]] = defaultdict(list)
        for name in files:
            if name.endswith(TRANSCRIPTS):
                continue
            stem = _stem(name)
            is_beside = _role(name) == "texts" and stem in files  # a.jpg.txt
            samples[_stem(stem) if is_beside else stem].append(name)
        for stem, names in samples.items():
            for key, chosen in self._samples(stem, names):
                place = f"{path}/{key}" if path else key
                text = transcripts.get(printable(stem))
                row = self._row(path_key(place), {name: files[name] for name in chosen}, text, split, label)
                if row is not None:
                    yield Found(printable(place), row)

    def _samples(self, stem: str, names: list[str]) -> Iterator[tuple[str, list[str]]]:
        """The name and the files of each sample: several images or clips of one stem are samples of their own."""
        kinds = Counter(format_of(_suffix(name)) for name in names)
        media = [name for name in names if _role(name) == "media"]
        if all(kinds[kind] < 2 for kind in MEDIA):
            if media or (not self._survey.media and any(_role(name) != "unknown" for name in names)):
                yield stem, names
            elif found := [name for name in names if _role(name) != "unknown"]:
                self._alone_count += len(found)
                self._alone = self._alone or found[:1]
            return
        self._twins += len(media)
        for name in media:
            beside = [other for other in names if other not in media and _stem(other) in (stem, name)]
            yield name, [name, *beside]

    def _row(self, key: str, files: dict[str, Ref], text: str | None, split: str, label: str) -> Row | None:
        own: dict[str, Ref] = {}
        members: dict[str, Ref] = {}
        texts: dict[str, Ref] = {}
        fields: dict[str, Any] = {}
        problem = ""
        for name, ref in files.items():
            suffix = _suffix(name)
            kind = format_of(suffix)
            if kind in MEDIA:
                own[kind] = ref
            elif suffix in TEXTS:
                texts[suffix] = ref
            elif kind:
                members[suffix] = ref
        try:
            if (meta := next((ref for name, ref in files.items() if _suffix(name) == META), None)) is not None:
                fields = self._fields(meta)
            if chosen := next((suffix for suffix in TEXTS if suffix in texts), ""):
                text = self._text(texts.pop(chosen))
        except ValueError as error:
            problem = str(error)
        if text is not None and has_text(text):
            if "text" in fields:
                fields["original_text"] = fields.pop("text")
            fields["text"] = text
        if PARTS in fields:  # documents are rows of a manifest
            fields[f"original_{PARTS}"] = fields.pop(PARTS)
        if label and not fields.get("label") and not fields.get("class"):
            fields["label"] = label
        try:
            members |= {suffix: ref for suffix, ref in texts.items() if suffix != "lab"}
            row = foreign_row(fields, key, split, own.get("image"), own.get("audio"), members)
        except ValueError as error:
            row, problem = Row(key, split=split), str(error)
        return with_problem(row, problem) if problem else sound(row)

    def _fields(self, ref: Ref) -> dict[str, Any]:
        value = parse_json(self._read(ref, MAX_META_BYTES), shown(ref), MAX_META_BYTES)
        if not isinstance(value, dict):
            raise ValueError(f"{shown(ref)} holds {type(value).__name__}, not an object")
        return value

    def _text(self, ref: Ref) -> str:
        return decoded(self._read(ref, MAX_TEXT_BYTES), ref)

    def _read(self, ref: Ref, most: int) -> bytes:
        require_inside(ref, self._root)
        return self._reader.read(ref, most)

    def _transcripts(self, files: Mapping[str, Ref]) -> dict[str, str]:
        """Text by name, of the lines ``NAME TEXT`` of LibriSpeech."""
        found: dict[str, str] = {}
        for ref in [files[name] for name in files if name.endswith(TRANSCRIPTS)]:
            for line in decoded(self._read(ref, MAX_JSON_BYTES), ref).splitlines():
                name, _, text = line.partition(" ")
                found[name] = text.strip()
        return found

    def notes(self) -> Iterator[str]:
        survey = self._survey
        if survey.has_classes and survey.classes:
            names = sorted(map(printable, survey.classes))
            more = ", ..." if len(names) > 3 else ""
            yield (
                f"folders are taken as classes ({len(names):,}: {', '.join(names[:3])}{more}); --column label= takes "
                f"them as none"
            )
        if self._alone:
            yield (
                f"{counted(self._alone_count, 'file')} without an image or audio of the same name in the same folder "
                f"left out, such as {printable(self._alone[0])}"
            )
        if self._twins:
            yield (
                f"{counted(self._twins, 'file')} that differ only by the suffix from another of their kind are "
                f"samples of their own"
            )
        if survey.unknown:
            named = ", ".join(f"{count:,} *.{suffix or '(none)'}" for suffix, count in survey.unknown.most_common(8))
            yield f"{counted(survey.unknown.total(), 'file')} of no format that is read left out: {named}"
        for what, count in survey.ignored.items():
            yield f"ignored {what}: {count:,}"


def decoded(data: bytes, ref: Ref) -> str:
    """A text file without the end of its last line. Raises ValueError."""
    try:
        return data.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown(ref)} is not UTF-8 (byte 0x{data[error.start]:02x})") from None
