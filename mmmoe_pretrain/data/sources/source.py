"""Samples of a source by number: the one way by which training, evaluation and the tools read shards.

``open_source`` makes of a path or URL (``listing.py``) an ``Indexed`` source, whose samples are read in any order by
ranges of bytes, or a ``Stream`` (``stream.py``), which is read on. A sample is identified by its shard and its key:
parallel writers often use the same keys. ``decode.py`` decodes the bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mmmoe_pretrain.data.sources.index import Index
from mmmoe_pretrain.data.sources.indexing import Ask, Walk, is_comparable, open_index, other_size
from mmmoe_pretrain.data.sources.listing import Listing, NoShards, is_remote, is_stream, list_shards
from mmmoe_pretrain.data.sources.members import META, RawSample, members_to_read, names
from mmmoe_pretrain.data.sources.stream import WINDOW, Stream, open_stream
from mmmoe_pretrain.data.storage.files import Files, MissingError, Stat
from mmmoe_pretrain.limits import MAX_MEMBER_BYTES
from mmmoe_pretrain.modalities import Modalities, default_modalities
from mmmoe_pretrain.untrusted import parse_json
from mmmoe_pretrain.urls import redacted

__all__ = ["Indexed", "NoShards", "open_indexed", "open_source"]

MAX_GAP = 64 << 10  # bytes between members that are read rather than asked for twice; local samples up to it, too
LOOKED_AT = 64  # kinds of samples whose JSON is searched for parts, before several images of one are refused


def open_source(
    spec: str | Path, files: Files, modalities: Modalities, seed: int = 0, window: int = WINDOW,
    listing: Listing | None = None, ask: Ask = "local",
) -> Indexed | Stream:  # fmt: skip
    """The source that ``spec`` names: ``Stream`` where it can only be read on, whose order within ``window`` samples
    depends on ``seed``; else ``Indexed``. ``listing``, ``ask``: see ``open_indexed``."""
    if is_stream(str(spec)):
        return open_stream(spec, files, modalities, seed, window)
    return open_indexed(spec, files, modalities, listing=listing, ask=ask)


def open_indexed(
    spec: str | Path,
    files: Files | None = None,
    modalities: Modalities | None = None,
    *,
    walk: Walk | None = None,
    listing: Listing | None = None,
    ask: Ask = "local",
) -> Indexed:
    """The shards that ``spec`` names, listed unless ``listing`` has them, and indexed where they are not (``walk``,
    ``ask``: see ``open_index``). Raises NoShards where nothing is there, ValueError where they cannot be used."""
    if is_stream(str(spec)):
        raise ValueError(
            f"{str(spec).split()[0]}: the output of a command is read in its order, for training alone; name shards "
            f"by a path or URL"
        )
    files = files or Files()
    try:
        listing = listing or list_shards(str(spec), files)
        return Indexed(listing, open_index(listing, files, walk, ask=ask), files, modalities)
    except MissingError as error:
        raise NoShards(str(error)) from None


class Indexed:
    """The samples of shards in the order of their listing, by number."""

    def __init__(self, listing: Listing, index: Index, files: Files, modalities: Modalities | None = None) -> None:
        """``modalities`` decide which members are read (default: one of each built-in kind, for tools)."""
        self.listing, self.spec, self.shards_left_out = listing, listing.spec, listing.left_out
        self._modalities = modalities
        self._index, self._files = index, files
        self.urls = [shard.url for shard in listing.shards]
        self._names = list(map(redacted, self.urls))  # what samples and errors say
        self._unknown: set[int] = set()  # shards of which this process knows no version yet
        for shard, (url, size) in enumerate(zip(self.urls, index.bytes.tolist(), strict=True)):
            if is_comparable(index.versions[shard], url):
                files.expect(url, Stat(size, index.versions[shard]))
            else:
                self._unknown.add(shard)
        self._read: dict[int, frozenset[str]] = {}  # kind -> the members that are read
        self._columns: dict[str, np.ndarray] = {}  # modality -> of each kind the number of the member that is read
        if modalities is not None:
            self._refuse_ties()

    def __len__(self) -> int:
        return len(self._index)

    @property
    def modalities(self) -> Modalities:
        return self._modalities or default_modalities()  # which import torch, and only reading needs

    @property
    def index_path(self) -> Path:
        """The file of the index."""
        return self._index.path

    @property
    def shard_sizes(self) -> np.ndarray:
        """The samples of each shard, int64 [S]."""
        return np.diff(self._index.first)

    @property
    def shard_bytes(self) -> np.ndarray:
        """The bytes of each shard, int64 [S]."""
        return self._index.bytes

    @property
    def contents(self) -> Counter[tuple[str, ...]]:
        """How many samples have members of which extensions, read or not."""
        counts = zip(self._index.kinds, self._index.counts.tolist(), strict=True)
        return Counter({kind: count for kind, count in counts if count})

    def with_contents(self, extensions: tuple[str, ...], most: int | None = None) -> np.ndarray:
        """The samples that have members of just these extensions, int64 [n], ascending; with ``most`` about so many,
        spread over them, for which little of the index is read."""
        kind = self._index.kinds.index(extensions)
        if most is None and self._index.counts[kind] == len(self):
            return np.arange(len(self))
        return np.concatenate(list(self._index.with_kind(kind, most)))

    def sizes_of(self, indices: np.ndarray, modality: str) -> np.ndarray:
        """int64 [n]: of each sample the bytes of the member that is read as ``modality``; 0 where there is none."""
        if modality not in self._columns:
            chosen = [(kind, self.modalities.members_read(kind).get(modality)) for kind in self._index.kinds]
            columns = [-1 if extension is None else kind.index(extension) for kind, extension in chosen]
            self._columns[modality] = np.asarray(columns, dtype=np.int64)
        return self._index.sizes(np.asarray(indices), self._columns[modality])

    def key(self, i: int) -> str:
        """The key of sample ``i``, which another shard may use as well."""
        return self._index.key(i)

    def places(self, i: int) -> tuple[str, dict[str, tuple[int, int]]]:
        """The URL of the shard of sample ``i``, and the offset and size of each of its members in it."""
        shard, kind, places = self._index.places(i)
        return self.urls[shard], dict(zip(self._index.kinds[kind], places, strict=True))

    def read(self, i: int, only: Iterable[str] | None = None) -> RawSample:
        """The bytes of the members of sample ``i`` that are read, or of those whose extensions are in ``only``.
        Where there is a JSON, which may name them as the parts of a document, all files in a format of some modality
        are read.

        Raises ValueError where the shard was changed since it was indexed.
        """
        shard, kind, places = self._index.places(i)
        url, extensions = self.urls[shard], self._index.kinds[kind]
        if shard in self._unknown:
            self._compare(shard)
        if only is None and kind not in self._read:
            self._read[kind] = members_to_read(extensions, self.modalities)
        wanted = self._read[kind] if only is None else frozenset(only)
        chosen = {e: place for e, place in zip(extensions, places, strict=True) if e in wanted}
        unread = tuple(extension for extension in extensions if extension not in wanted)
        return RawSample(self.key(i), self._bytes(url, chosen), self._names[shard], unread)

    def _compare(self, shard: int) -> None:
        url, size = self.urls[shard], int(self._index.bytes[shard])
        stat = self._files.stat(url)
        if stat.size != size:
            raise ValueError(other_size(url, stat.size, "its index", size, self._index.path))
        self._files.expect(url, stat)
        self._unknown.discard(shard)

    def _bytes(self, url: str, places: dict[str, tuple[int, int]]) -> dict[str, bytes]:
        if any(size > MAX_MEMBER_BYTES for _, size in places.values()):
            raise ValueError(f"{redacted(url)} holds a file of more than {MAX_MEMBER_BYTES} bytes; leave it out")
        start = min((offset for offset, _ in places.values()), default=0)
        end = max((offset + size for offset, size in places.values()), default=0)
        gap = end - start - sum(size for _, size in places.values())
        if gap <= MAX_GAP and len(places) > 1 and (end - start <= MAX_GAP or is_remote(url)):
            data = self._files.read(url, start, end - start)
            return {name: data[offset - start : offset - start + size] for name, (offset, size) in places.items()}
        return {name: self._files.read(url, offset, size) for name, (offset, size) in places.items()}

    def _refuse_ties(self) -> None:
        """Raise ValueError where only the alphabet would decide which of two members is read; in a document, its JSON
        names what is read."""
        looked = 0
        for number, extensions in enumerate(self._index.kinds):
            tied = self.modalities.tied(extensions) if self._index.counts[number] else None
            if tied is None:
                continue
            first = self._index.first_of[number]
            if META in extensions:
                looked += 1
                if looked > LOOKED_AT or self._is_document(first):
                    continue
            name, members = tied
            raise ValueError(
                f"sample {self.key(first)!r} of {self._names[self._index.shard_of(first)[0]]} has "
                f"{names(members)}, and one of them is read as {name}: name it, e.g. modalities.{name}.members: "
                f"[{members[0]}], and give {members[1]} a modality of its own (kind: "
                f"{self.modalities[name].settings.kind}) where both are to be read"
            )

    def _is_document(self, i: int) -> bool:
        try:
            row = parse_json(self.read(i, only=(META,)).members[META], META)
        except ValueError:  # a bad sample, which training skips
            return True
        return isinstance(row, dict) and "parts" in row
