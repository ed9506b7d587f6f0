"""A row becomes a sample: its files are read, decoded once so that no broken one gets into a shard, and encoded.

Runs in worker processes. Whatever a row or its files hold, the outcome is a sample, or a reason why there is none.
"""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mmmoe_pretrain.data.sources.members import META
from mmmoe_pretrain.data_prep.memory import memory_at_most
from mmmoe_pretrain.data_prep.quality.filters import Filtered, Filters
from mmmoe_pretrain.data_prep.rows.documents import PARTS, parts_of
from mmmoe_pretrain.data_prep.rows.refs import Reader, Ref, file_name, printable, shown
from mmmoe_pretrain.data_prep.rows.row import Row, require_inside, sample_fields
from mmmoe_pretrain.data_prep.rows.spool import read_rows
from mmmoe_pretrain.data_prep.shards.fetch import Fetcher, FetchError, FetchOptions
from mmmoe_pretrain.data_prep.shards.media import Check, Media, MediaOptions
from mmmoe_pretrain.data_prep.shards.records import BROKEN, FILTERED, OK
from mmmoe_pretrain.limits import MAX_META_BYTES, MAX_TEXT_BYTES, has_lone_surrogate, has_text, use_aliases
from mmmoe_pretrain.untrusted import parse_json

DECODED = ("image", "audio")  # kinds whose files are decoded here; those of others pass as they are
TOLD = ("language", "label", "group", "licence", "source")  # fields of a row in its record
MOST_TOLD = 1024  # characters of a value in a record; KEY.json has all of it
MOST_NAMED = 8  # fields
DECODER_BYTES = 2 << 30  # twice what the largest image takes; metadata of millions of parts takes more
KEPT_BYTES = 16 << 20  # of encoded images that a process keeps, since rows share images


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A key and its members, suffix -> bytes. ``facts``: what is known of them (``width``, ``seconds``, ...)."""

    key: str
    members: Mapping[str, bytes]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BadSample:
    """A key and why it has no sample. ``filtered``: by a filter that the user set; else it is broken. ``retry``: a
    download failed in a way that may pass; ``url``: of a download, whose reason does not name it."""

    key: str
    reason: str
    filtered: bool = False
    retry: bool = False
    url: str = ""


class Encoder:
    """Makes samples of rows whose paths are relative to ``root``."""

    def __init__(
        self, root: Path, options: MediaOptions, fetch: FetchOptions | None = None, filters: Filters | None = None
    ) -> None:
        warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a file is its reason
        self._root, self._options, self._filters = root, options, filters or Filters()
        self._fetcher = Fetcher(fetch or FetchOptions())
        self._reader = Reader(root, fetch=self._fetcher.get)
        self._kept: OrderedDict[Ref, Media] = OrderedDict()
        self._kept_bytes = 0
        self._ahead: dict[int, list[str]] = {}  # offset of a row -> its URLs, which are fetched

    def __call__(self, row: Row) -> EncodedSample | BadSample:
        if row.problem:
            return BadSample(row.key, row.problem)
        try:
            if row.copied:
                members = {extension: self._reader.read(ref) for extension, ref in row.members.items()}
                self._filters.check_sample(row.key, members)
                return EncodedSample(row.key, members, _told(members))
            self._filters.check_row(row)
            return self._document(row) if row.parts is not None else self._sample(row)
        except Filtered as error:
            return BadSample(row.key, str(error), filtered=True)
        except FetchError as error:
            return BadSample(row.key, str(error), retry=error.retry, url=error.url)
        except ValueError as error:
            return BadSample(row.key, str(error))

    def encode_all(self, task: Task, spool: Path) -> list[Outcome]:
        """The rows of a task; files at URLs are fetched ahead, also those of the tasks that come next."""
        rows = list(read_rows(spool, task.offsets))
        if any(row.urls for row, _ in rows):
            self._fetch(task.offsets, (row for row, _ in rows))
            later = [offset for offset in task.next_offsets if offset not in self._ahead]
            self._fetch(later, (row for row, _ in read_rows(spool, later)))
        found = []
        for offset, (row, line) in zip(task.offsets, rows, strict=True):
            digest = row_digest(row, line, self._reader)  # first: a file that changes meanwhile is read again
            sample = self(row)
            found.append(Outcome(sample, digest, _record(row, sample)))
            self._fetcher.drop(self._ahead.pop(offset, ()))
        return found

    def _fetch(self, offsets: Sequence[int], rows: Iterable[Row]) -> None:
        for offset, row in zip(offsets, rows, strict=True):
            if offset not in self._ahead:
                self._ahead[offset] = row.urls
                self._fetcher.want(self._ahead[offset])

    def _sample(self, row: Row) -> EncodedSample:
        if len((row.text or "").encode()) > MAX_TEXT_BYTES:
            raise ValueError(f"its text has more than {MAX_TEXT_BYTES:,} bytes, and at most so many are read")
        if not row.modalities:
            names = ", ".join(printable(name)[:80] for name in itertools.islice(row.extra, MOST_NAMED))
            others = f" (its other fields: {names}{', ...' * (len(row.extra) > MOST_NAMED)})" if row.extra else ""
            what = "a blank text and no image or audio" if row.text else "no image, audio or text"
            raise ValueError(f"it has {what}{others}")
        members: dict[str, bytes] = {}
        facts: dict[str, Any] = {}
        for kind, ref in (("image", row.image), ("audio", row.audio)):
            if ref:
                media = self.media(kind, ref)
                members[media.suffix] = media.data
                facts |= media.facts
        for extension, ref in row.members.items():
            if extension in members:
                raise ValueError(f"two of its files would be {row.key}.{extension}; leave one out, or rename it")
            require_inside(ref, self._root)
            members[extension] = self._reader.read(ref)
        if has_text(row.text or ""):
            members["txt"] = (row.text or "").encode()
        members[META] = json.dumps(sample_fields(row), ensure_ascii=False).encode()
        if len(members[META]) > MAX_META_BYTES:
            raise ValueError(f"its fields take {len(members[META]):,} bytes, at most {MAX_META_BYTES:,} are read")
        return EncodedSample(row.key, members, facts)

    def _document(self, row: Row) -> EncodedSample:
        members: dict[str, bytes] = {}
        parts: list[dict[str, Any]] = []
        for number, part in enumerate(parts_of(row.parts, row.members)):
            if part.text is not None:
                parts.append({part.name: part.text, **part.other})
                continue
            if part.name not in DECODED:
                require_inside(part.path, self._root, f"part {number} of {PARTS}: ")
            media = self.media(part.name, part.path)
            members[f"{number}.{media.suffix}"] = media.data
            parts.append({"member": f"{number}.{media.suffix}", **part.other})
        data = json.dumps({**sample_fields(row), PARTS: parts}, ensure_ascii=False).encode()
        if len(data) > MAX_META_BYTES:
            raise ValueError(f"its texts and fields take {len(data):,} bytes, at most {MAX_META_BYTES:,} are read")
        return EncodedSample(row.key, {**members, META: data})

    def media(self, kind: str, ref: Ref) -> Media:
        """A file of the row. Raises ValueError where it cannot be used."""
        if kind == "image" and (kept := self._kept.get(ref)):
            self._kept.move_to_end(ref)
            self._filters.check_media(kept.facts)
            return kept
        data, check = self._reader.read(ref), self._filters.check_media
        media = member(kind, file_name(ref), data, self._options, check, shown(ref))
        if kind == "image" and media.encoded:
            self._kept[ref] = media
            self._kept_bytes += len(media.data)
            while self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= len(self._kept.popitem(last=False)[1].data)
        return media


def _told(members: Mapping[str, bytes]) -> dict[str, str]:
    """What the JSON of a sample that is copied says for its record."""
    try:
        fields = parse_json(members.get(META, b"{}"), META, MAX_META_BYTES)
    except ValueError:  # the sample is copied as it is
        return {}
    if not isinstance(fields, dict):
        return {}
    use_aliases(fields)
    told = {name: fields[name] for name in TOLD if isinstance(fields.get(name), str)}
    return {name: value for name, value in told.items() if not has_lone_surrogate(value)}


class Outcome(NamedTuple):
    """What became of a row. ``digest``: of what its sample depends on; ``record``: for ``records.py``."""

    sample: EncodedSample | BadSample
    digest: bytes
    record: dict[str, Any]


class Task(NamedTuple):
    """Rows at ``offsets`` of a spool, and where those of the same process's next tasks are."""

    offsets: Sequence[int]
    next_offsets: Sequence[int] = ()


def encode_at(
    task: Task, spool: Path, root: Path, options: MediaOptions, fetch: FetchOptions, filters: Filters
) -> list[Outcome]:
    return _encoder(root, options, fetch, filters).encode_all(task, spool)


@functools.lru_cache(maxsize=1)  # of a process: it keeps connections, and images that rows share
def _encoder(root: Path, options: MediaOptions, fetch: FetchOptions, filters: Filters) -> Encoder:
    return Encoder(root, options, fetch, filters)


def row_digest(row: Row, line: bytes, reader: Reader) -> bytes:
    """Changes when the row, whose JSON is ``line``, or one of its files does."""
    digest = xxhash.xxh3_128(line)
    digest.update(repr([reader.stamp(ref) for ref in row.files]).encode())
    return digest.digest()


def content_of(row: Row) -> str:
    """``image+text``, ``document of image``."""
    return ("document of " if row.parts is not None else "") + "+".join(row.modalities)


def _record(row: Row, sample: EncodedSample | BadSample) -> dict[str, Any]:
    """Thousands of records are in memory while a shard is written, so each is short."""
    values = _record_of(row, sample)
    return {name: value[:MOST_TOLD] if isinstance(value, str) else value for name, value in values.items()}


def _record_of(row: Row, sample: EncodedSample | BadSample) -> dict[str, Any]:
    record: dict[str, Any] = {"key": row.key, **{name: getattr(row, name) or None for name in TOLD}}
    record["content"] = content_of(row)
    if isinstance(sample, BadSample):
        status = FILTERED if sample.filtered else BROKEN
        return {**record, "status": status, "reason": sample.reason, "retry": sample.retry}
    texts = row.texts
    record |= {
        "status": OK,
        "bytes": sum(map(len, sample.members.values())),
        "text_characters": sum(map(len, texts)),
        "text_xxh3": xxhash.xxh3_128_hexdigest("\n".join(texts).encode()) if texts else None,
        "blank_texts": int(bool(row.text) and not has_text(row.text or "")),
    }
    return record | dict(sample.facts)


def member(
    kind: str, name: str, data: bytes, options: MediaOptions, check: Check = lambda facts: None, where: str = ""
) -> Media:
    """The content ``data`` of the file ``name`` as a member of a shard. Images and clips are decoded once within the
    limits of the loader, so that no broken one gets into a shard; ``check`` is called once their facts are known.
    Raises ValueError, which says ``where`` the file is."""
    if kind == "image":
        from mmmoe_pretrain.data_prep.shards.images import image_member as encode
    elif kind == "audio":
        from mmmoe_pretrain.data_prep.shards.audio import audio_member as encode
    else:
        return Media(_suffix(name, kind), data)
    try:
        with memory_at_most(DECODER_BYTES):
            return encode(name, data, options, check)
    except MemoryError:
        most = f"{DECODER_BYTES >> 20:,} MiB"
        raise ValueError(f"{where or name} takes more than {most} of memory to be decoded; leave it out") from None
    except ValueError as error:
        raise ValueError(f"{where or name} {error}") from None


def _suffix(name: str, kind: str) -> str:
    from mmmoe_pretrain.modalities import reads

    formats = reads(kind).formats
    suffix = Path(name).suffix
    if suffix.lower().removeprefix(".") not in formats:
        raise ValueError(f"{name}: suffix {suffix!r} is not one of {', '.join(f'.{f}' for f in formats)}")
    return suffix.lower().removeprefix(".")
