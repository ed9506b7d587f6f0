"""The fingerprints of all samples of shards, made by worker processes, in one file of records.

A sample has one key: its digest by the first entry of ``by`` of which it has all media. By default that is its image,
else its audio, else its text, so the same image with another caption is a duplicate; ``image+text`` asks for both. A
document's key is of all its texts and files in their order.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from mmmoe_pretrain.data.decode import PARTS, BadSampleError, contents, document, read_row
from mmmoe_pretrain.data.sources.members import RawSample
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data_prep.pool import map_in_order
from mmmoe_pretrain.data_prep.quality.fingerprints import COLOURS, PERMUTATIONS, look_of, signature
from mmmoe_pretrain.data_prep.rows.row import SPLITS, split_called
from mmmoe_pretrain.data_prep.rows.splits import normalise_text
from mmmoe_pretrain.limits import has_text
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.progress import Progress

NEAR = 4, 0.8  # the defaults of --image-distance and --text-similarity
MEDIA = ("image", "audio", "text")
DOCUMENT, NOTHING = 254, 255  # forms of samples, beside the numbers of entries of ``by``
DAMAGED, EMPTY, UNDECODED = "damaged samples", "samples without any of --by", "images that cannot be decoded"
_AT_ONCE = 64  # samples a task


@dataclass(frozen=True, slots=True)
class Settings:
    """``near``: also what is close: images by ``image_distance`` bits, texts by their Jaccard ``text_similarity``."""

    by: tuple[tuple[str, ...], ...] = (("image",), ("audio",), ("text",))
    near: bool = False
    image_distance: int = NEAR[0]
    text_similarity: float = NEAR[1]

    def __post_init__(self) -> None:
        if not self.near and (self.image_distance, self.text_similarity) != NEAR:
            raise ValueError("--image-distance and --text-similarity are those of near duplicates; give --near, too")

    def record(self) -> np.dtype[np.void]:
        """Of a sample. ``look``: a hash of all that near duplicates are found by; 0 where it is not comparable."""
        fields: list[Any] = [("digest", "<u8", 2), ("form", "u1"), ("split", "u1")]
        if self.near:
            fields += [("look", "<u8"), ("audio", "<u8"), ("phash", "<u8"), ("colours", "u1", COLOURS)]
            if any("text" in media for media in self.by):
                fields += [("signature", "<u2", PERMUTATIONS)]
        return np.dtype(fields)


def read_by(text: str) -> tuple[tuple[str, ...], ...]:
    """``image+text,audio`` as entries of media. Raises ValueError."""
    by = tuple(tuple(sorted(entry.strip().split("+"), key=_place)) for entry in text.split(","))
    for entry in by:
        if len(set(entry)) < len(entry) or not set(entry) <= set(MEDIA) or by.count(entry) > 1:
            raise ValueError(f"--by {text} is no list of {', '.join(MEDIA)}, or of several such as image+text")
    return by


def _place(name: str) -> int:
    return MEDIA.index(name) if name in MEDIA else len(MEDIA)


@dataclass(slots=True)
class Source:
    """Samples ``first`` to ``first + count`` of all: of shards, or of a list of hashes (``shards`` is None)."""

    name: str
    is_held_out: bool
    count: int
    shards: Indexed | None = None
    first: int = 0
    ends: np.ndarray = field(init=False)  # of the shards, as numbers of samples

    def __post_init__(self) -> None:
        self.ends = np.cumsum([self.count] if self.shards is None else self.shards.shard_sizes)


@dataclass(slots=True)
class Samples:
    """``records``: of all samples, in a file. ``problems``: how many samples could not be compared, by reason."""

    sources: list[Source]
    records: np.ndarray
    problems: Counter[str] = field(default_factory=Counter)

    def held_out(self) -> np.ndarray:
        """bool [n]."""
        return np.repeat([s.is_held_out for s in self.sources], [s.count for s in self.sources])

    def place(self, number: int) -> tuple[Source, int]:
        """The source of a sample, and its number there."""
        firsts = [source.first for source in self.sources]
        source = self.sources[int(np.searchsorted(firsts, number, side="right")) - 1]
        return source, number - source.first


def read_samples(
    shards: Sequence[tuple[Indexed, bool]], lists: Sequence[tuple[str, np.ndarray]], settings: Settings, workers: int
) -> Samples:
    """The fingerprints of ``shards``, with whether they are held out, and digests [n, 2] of held-out ``lists``."""
    sources = [Source(name, True, len(digests)) for name, digests in lists if len(digests)]
    sources += [Source(source.spec, is_held_out, len(source), source) for source, is_held_out in shards]
    for before, source in itertools.pairwise(sources):
        source.first = before.first + before.count
    kind, problems = settings.record(), Counter[str]()
    total = sum(source.count for source in sources)
    _opened.cache_clear()  # of an earlier call in this process, since when shards may have been replaced
    with tempfile.TemporaryFile() as file, Progress("hashing", total, "samples") as progress:
        try:
            for _, digests in lists:
                file.write(_records_of(digests, kind).tobytes())
                progress.advance(len(digests))
            work = functools.partial(fingerprint, settings=settings)
            with contextlib.closing(map_in_order(work, _tasks(shards), workers)) as results:
                for data, found in results:
                    file.write(data)
                    problems += found
                    progress.advance(len(data) // kind.itemsize)
            file.flush()
        except OSError as error:
            raise _disk_problem(error, total * kind.itemsize) from None
        return Samples(sources, _mapped(file, kind, total), problems)


def _mapped(file: IO[bytes], kind: np.dtype[np.void], total: int) -> np.ndarray:
    return np.memmap(file, kind, "r", shape=(total,)) if total else np.empty(0, kind)


def _disk_problem(error: OSError, size: int) -> Exception:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    folder = tempfile.gettempdir()
    return ValueError(
        f"the fingerprints take {size / 1e6:,.0f} MB, and {folder} is full; set TMPDIR to a larger disk"
    )


def _records_of(digests: np.ndarray, kind: np.dtype[np.void]) -> np.ndarray:
    records = np.zeros(len(digests), kind)
    records["digest"], records["form"], records["split"] = digests, 0, len(SPLITS)
    return records


def _tasks(shards: Sequence[tuple[Indexed, bool]]) -> Iterator[tuple[str, int, int]]:
    for source, _ in shards:
        for start in range(0, len(source), _AT_ONCE):
            yield source.spec, start, min(start + _AT_ONCE, len(source))


@functools.lru_cache(maxsize=8)  # of a process
def _opened(spec: str) -> Indexed:
    return open_indexed(spec)


def fingerprint(task: tuple[str, int, int], settings: Settings) -> tuple[bytes, Counter[str]]:
    """The records of the samples from one number to another of a source."""
    spec, start, end = task
    source, problems = _opened(spec), Counter[str]()
    records = np.zeros(end - start, settings.record())
    for record, number in zip(records, range(start, end), strict=True):
        record["form"] = NOTHING
        raw = source.read(number)
        try:
            row = read_row(raw)
            record["split"] = _split_of(row, spec)
            _fill(record, raw, row, source, settings, problems)
        except BadSampleError:
            problems[DAMAGED] += 1
    return records.tobytes(), problems


def _split_of(row: dict[str, Any], spec: str) -> int:
    """The number of the split that the sample or its folder names; that of none is behind them."""
    own = row.get("split")
    name = split_called(own if isinstance(own, str) and own else Path(spec.rstrip("/")).name)
    return SPLITS.index(name) if name in SPLITS else len(SPLITS)


def _fill(
    record: Any, raw: RawSample, row: dict[str, Any], source: Indexed, settings: Settings, problems: Counter[str]
) -> None:
    if PARTS in row:
        record["form"], record["digest"] = DOCUMENT, _numbers(document_digest(raw, row, source.modalities))
        return
    media = media_of(raw, row, source.modalities)
    form = next((n for n, entry in enumerate(settings.by) if media.keys() >= {*entry}), None)
    if form is None:
        problems[EMPTY] += 1
        return
    entry = settings.by[form]
    digests = [xxhash.xxh3_128_digest(media[name]) for name in entry]
    whole = digests[0] if len(entry) == 1 else xxhash.xxh3_128_digest(b"".join(digests))
    record["form"], record["digest"] = form, _numbers(whole)
    if not settings.near or entry == ("audio",):
        return
    if "audio" in entry:
        record["audio"] = _numbers(digests[entry.index("audio")])[0]
    if "image" in entry and not _add_look(record, media["image"], problems):
        return
    if "text" in entry:
        record["signature"] = signature(media["text"].decode())
    record["look"] = xxhash.xxh3_64_intdigest(record.tobytes()[record.dtype.fields["audio"][1] :]) or 1


def _add_look(record: Any, data: bytes, problems: Counter[str]) -> bool:
    from mmmoe_pretrain.modalities.image_file import IMAGE_ERRORS

    try:
        look = look_of(data)
    except IMAGE_ERRORS:
        problems[UNDECODED] += 1
        return False
    if look is not None:
        record["phash"], record["colours"] = look
    return look is not None


def media_of(raw: RawSample, row: dict[str, Any], modalities: Modalities) -> dict[str, bytes]:
    """The bytes of each medium; of a text, normalised."""
    found = contents(raw, row, modalities)
    media = {name: found[name] for name in ("image", "audio") if found.get(name)}
    text = modalities["text"].raw(found["text"]) if "text" in found else ""
    return {**media, "text": normalise_text(text).encode()} if has_text(text) else media


def document_digest(raw: RawSample, row: dict[str, Any], modalities: Modalities) -> bytes:
    """Of all texts and files in their order."""
    digest = xxhash.xxh3_128(PARTS.encode())
    for part in document(row, raw.members, modalities, any_kind=True):
        data = raw.members[part.member] if part.string is None else normalise_text(part.string).encode()
        digest.update(f"{part.name} {len(data)} ".encode())
        digest.update(data)
    return digest.digest()


def _numbers(digest: bytes) -> np.ndarray:
    return np.frombuffer(digest, ">u8").astype("<u8")
