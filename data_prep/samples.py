"""The samples of anything that tools look at, one at a time: shards, as the loader reads them, or rows of an input.

Texts are read with a sample, other files when they are asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mmmoe_pretrain.data.decode import BadSampleError, contents, document, read_row
from mmmoe_pretrain.data.sources.listing import LIST, is_compressed, is_remote
from mmmoe_pretrain.data.sources.members import CLASS, META, RawSample
from mmmoe_pretrain.data.sources.source import Indexed
from mmmoe_pretrain.data.sources.survey import held_by, in_order, survey
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.rows.documents import PARTS, parts_of
from mmmoe_pretrain.data_prep.rows.inputs import open_input
from mmmoe_pretrain.data_prep.rows.refs import Reader, Ref, file_name, shown
from mmmoe_pretrain.data_prep.rows.row import Fault, Found, Row, faults, require_inside, sample_fields, split_called
from mmmoe_pretrain.data_prep.rows.shards import holds_shards
from mmmoe_pretrain.data_prep.shards.encode import DECODED
from mmmoe_pretrain.data_prep.verify import open_splits, split_named
from mmmoe_pretrain.limits import MAX_TEXT_BYTES, has_text
from mmmoe_pretrain.modalities import format_of
from mmmoe_pretrain.progress import track
from mmmoe_pretrain.urls import redacted

NO_SPLIT = "(none)"  # neither the folder nor the sample names one


class Piece(NamedTuple):
    """A text, or a file of the kind ``kind``. ``read``: None for a text, and for a file at a URL that a row names,
    which is not fetched to look at it."""

    kind: str
    name: str
    text: str | None = None
    read: Callable[[], bytes] | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """``where``: its shard, or its place in the input; ``held``: its modalities; ``problem``: why it cannot be
    used."""

    where: str
    key: str
    split: str
    fields: Mapping[str, Any]
    pieces: tuple[Piece, ...] = ()
    held: tuple[str, ...] = ()
    is_document: bool = False
    problem: str = ""

    def texts(self) -> Iterator[str]:
        """Those that are not blank, of files, too."""
        for piece in self.pieces:
            text = piece.text
            if piece.kind == "text" and piece.read is not None:
                text = piece.read()[:MAX_TEXT_BYTES].decode("utf-8-sig", "replace")
            if text is not None and has_text(text):
                yield text


def open_samples(path: str) -> Shards | Rows:
    """The samples at a path or URL."""
    return Shards(path) if _names_shards(path) else Rows(path)


def _names_shards(path: str) -> bool:
    """Also of a folder of several sets, which ``open_splits`` refuses with their names."""
    place = Path(path)
    if place.is_dir():
        folders = [place, *(inside for inside in place.iterdir() if inside.is_dir())]
        holds_some = any(map(_holds_shards, folders)) or any(place.glob(f"*/*/{LIST}"))
        return not (place / "manifest.jsonl").is_file() and holds_some
    return not place.is_file() or place.suffix in (".tar", ".json") or is_compressed(place.name)


def _holds_shards(folder: Path) -> bool:
    return holds_shards(folder) or any(is_compressed(inside.name) for inside in folder.iterdir())


class Shards:
    """The samples of shards, with progress."""

    def __init__(self, path: str) -> None:
        files = Files()
        self.name, self.files = redacted(path), files
        self.sources = open_splits([path], files)

    def __iter__(self) -> Iterator[Sample]:
        for source in self.sources:
            split, name = split_named(source.spec, NO_SPLIT), Path(redacted(source.spec)).name
            for i in track(range(len(source)), f"reading {name}", len(source), "samples"):
                yield _of_shard(source, i, split)

    def left_out(self) -> str:
        """The extensions that are not read, with their numbers."""
        return survey(self.sources).left_out()


def _of_shard(source: Indexed, i: int, split: str) -> Sample:
    known = source.modalities
    extensions = source.read(i, only=()).unread
    chosen = known.members_read(extensions)
    texts = {e for e in extensions if format_of(e) == "text"} if META in extensions else set(chosen.values())
    texts = {e for e in texts if known.read_as(e) and known[str(known.read_as(e))].default_field}
    raw = source.read(i, only={META, CLASS, *texts})
    try:
        row = read_row(raw)
        held, _ = held_by(raw, row, known, any_kind=True)
        pieces = tuple(_pieces(source, i, raw, row, chosen))
    except BadSampleError as error:
        return Sample(raw.shard, raw.key, split, {}, problem=str(error))
    fields = {name: value for name, value in row.items() if name not in (PARTS, "text")}
    stated = fields.get("split")
    split = split_called(stated) if isinstance(stated, str) and stated else split
    problem = "" if held else "it has no content that is read"
    return Sample(raw.shard, raw.key, split, fields, pieces, in_order(held, known), PARTS in row, problem)


def _pieces(
    source: Indexed, i: int, raw: RawSample, row: dict[str, Any], chosen: Mapping[str, str]
) -> Iterator[Piece]:
    known, extensions = source.modalities, (*raw.members, *raw.unread)

    def file(kind: str, extension: str) -> Piece:
        return Piece(kind, extension, read=functools.partial(_member, source, i, extension))

    if PARTS in row:
        for part in document(row, extensions, known, any_kind=True):
            kind = format_of(part.member) or part.name if part.member else part.name
            yield Piece(kind, "", part.string) if part.string is not None else file(kind, part.member)
        return
    in_texts = contents(raw, row, known)
    for name in known:
        if known[name].default_field:
            if text := known[name].raw(in_texts.get(name, b"")):
                yield Piece(name, chosen.get(name, META), text)
        elif name in chosen:
            yield file(name, chosen[name])


def _member(source: Indexed, i: int, extension: str) -> bytes:
    return source.read(i, only=(extension,)).members[extension]


class Rows:
    """The rows of an input; their files lie where they name them."""

    def __init__(self, path: str) -> None:
        given = open_input(Path(path))
        self.name, self._given = given.name, given
        self._reader = Reader(given.root)

    def __iter__(self) -> Iterator[Sample]:
        for found in self._given.rows:
            if isinstance(found, Fault):
                yield Sample(found.where, "", NO_SPLIT, {}, problem=found.reason)
            else:
                yield self._sample(found)

    def _sample(self, found: Found) -> Sample:
        row, where = found.row, found.where
        problem = next(faults(row), "")
        try:
            pieces = tuple(self._pieces(row))
        except ValueError as error:
            pieces, problem = (), problem or str(error)
        if not row.modalities and not problem:
            problem = "it has no image, audio or text"
        fields, split = sample_fields(row), row.split or NO_SPLIT
        return Sample(where, row.key, split, fields, pieces, row.modalities, row.parts is not None, problem)

    def _pieces(self, row: Row) -> Iterator[Piece]:
        if row.parts is not None:
            for part in parts_of(row.parts):
                yield Piece(part.name, "", part.text) if part.text is not None else self._file(part.name, part.path)
            return
        own: tuple[tuple[str, Ref | None], ...] = (("image", row.image), ("audio", row.audio))
        others = ((format_of(extension) or extension, ref) for extension, ref in row.members.items())
        for kind, ref in (*own, *others):
            if ref:
                yield self._file(kind, ref)
        if row.text and has_text(row.text):
            yield Piece("text", "", row.text)

    def _file(self, kind: str, ref: Ref) -> Piece:
        if is_remote(ref if isinstance(ref, str) else ref.path):
            return Piece(kind, shown(ref))
        if kind not in DECODED:
            require_inside(ref, self._given.root)
        return Piece(kind, file_name(ref), read=functools.partial(self._reader.read, ref))

    def left_out(self) -> str:
        return ""
