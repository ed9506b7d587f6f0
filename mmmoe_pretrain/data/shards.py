"""A folder of tar shards, read by position.

Opens and checks shards (docs/data_format.md) and reads one sample's bytes, which ``decode.py`` decodes. The index is
a few arrays for any number of samples. A sample is identified by its shard and its key: parallel writers often use
the same keys.
"""

from __future__ import annotations

import os
import re
import resource
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmmoe_pretrain.data import tar
from mmmoe_pretrain.data.members import META, dotted_key, names, split_name
from mmmoe_pretrain.limits import MAX_KEY_BYTES, MAX_MEMBER_BYTES
from mmmoe_pretrain.modalities import Modalities, default_modalities, format_of
from mmmoe_pretrain.progress import Progress
from mmmoe_pretrain.untrusted import brief, read_json

MAX_OPEN_SHARDS = 256
SHARE_OF_DESCRIPTORS = 4  # at most one in so many of those that the process may have
LISTING = "shards.json"
_LIKE_A_SHARD = re.compile(r"\.(tar|tgz)(\.(gz|bz2|xz|zst|lz4))?$", re.IGNORECASE)


@dataclass(frozen=True)
class RawSample:
    """One sample as bytes, by the extension of each member that is read."""

    key: str
    members: dict[str, bytes]
    shard: str = ""
    unread: tuple[str, ...] = ()  # extensions of the other members


@dataclass(frozen=True)
class IndexedSample:
    """The position of a sample's members in its shard: extension -> (offset, size)."""

    key: str
    members: dict[str, tuple[int, int]]


class OpenShards:
    """Open descriptors of shards: a bounded number for all folders that share this."""

    def __init__(self, limit: int | None = None) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        room = soft // SHARE_OF_DESCRIPTORS if soft != resource.RLIM_INFINITY else MAX_OPEN_SHARDS
        self.limit = max(1, limit or min(MAX_OPEN_SHARDS, room))
        self._descriptors: OrderedDict[Path, int] = OrderedDict()  # least recently used first

    def descriptor(self, path: Path) -> int:
        """The descriptor of the shard ``path``, to be used before the next call."""
        if path in self._descriptors:
            self._descriptors.move_to_end(path)
        else:
            while len(self._descriptors) >= self.limit:
                os.close(self._descriptors.popitem(last=False)[1])
            self._descriptors[path] = os.open(path, os.O_RDONLY)
        return self._descriptors[path]

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


class ShardFolder:
    """The samples of a folder's shards, in the order of ``shards.json`` or of the names."""

    def __init__(
        self, folder: str | Path, files: OpenShards | None = None, modalities: Modalities | None = None
    ) -> None:
        """``files`` is shared by the folders that a process reads at the same time. ``modalities`` decide which
        members are read (default: one of each built-in kind)."""
        self.folder = Path(folder)
        self.modalities = modalities or default_modalities()
        self._files = OpenShards() if files is None else files
        self._paths = list_shards(self.folder)
        counts, keys, kinds, places = [], [], [], []
        kind_of: dict[tuple[str, ...], int] = {}  # extensions of a sample, of which there are few different ones
        with Progress(f"opening {self.folder}", len(self._paths), "shards") as progress:
            for path in self._paths:
                samples = read_index(path)
                counts.append(len(samples))
                keys.append(np.asarray([sample.key.encode() for sample in samples], dtype=np.bytes_))
                kinds += [kind_of.setdefault(tuple(sample.members), len(kind_of)) for sample in samples]
                at = [place for sample in samples for place in sample.members.values()]
                places.append(np.asarray(at, dtype=np.int64).reshape(-1, 2))
                progress.advance()
        self._extensions = list(kind_of)
        self._read = [self._members_to_read(extensions) for extensions in self._extensions]
        self._kind = np.asarray(kinds, dtype=np.int32)
        lengths = np.asarray([len(extensions) for extensions in self._extensions])[self._kind]
        self._first_sample = np.concatenate([[0], np.cumsum(counts)])
        self._first_member = np.concatenate([[0], np.cumsum(lengths)])
        self._places = np.concatenate(places)
        self._keys = np.concatenate(keys)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def contents(self) -> Counter[tuple[str, ...]]:
        """How many samples have members of which extensions, read or not."""
        counts = np.bincount(self._kind, minlength=len(self._extensions))
        return Counter(dict(zip(self._extensions, counts.tolist(), strict=True)))

    def with_contents(self, extensions: tuple[str, ...]) -> np.ndarray:
        """The samples that have members of just these extensions, int64 [n]."""
        return np.flatnonzero(self._kind == self._extensions.index(extensions))

    @property
    def shards_left_out(self) -> Counter[str]:
        """How many shards of the folder are not read, by their extension."""
        return shards_left_out(self.folder, self._paths)

    def key(self, i: int) -> str:
        """The key of sample ``i``, which another shard may use as well."""
        return bytes(self._keys[i]).decode()

    def read(self, i: int, only: Iterable[str] | None = None) -> RawSample:
        """The bytes of the members of sample ``i`` that are read, or of those whose extensions are in ``only``.
        Where there is a JSON, which may name them as the parts of a document, all files in a format of some modality
        are read.

        Raises ValueError where the shard has shrunk since it was opened.
        """
        path = self._paths[int(np.searchsorted(self._first_sample, i, side="right")) - 1]
        kind = self._kind[i]
        extensions = self._extensions[kind]
        places = self._places[self._first_member[i] : self._first_member[i + 1]].tolist()
        sample = IndexedSample(self.key(i), dict(zip(extensions, map(tuple, places), strict=True)))
        return read_sample(sample, self._files.descriptor(path), path, self._read[kind] if only is None else only)

    def _members_to_read(self, extensions: tuple[str, ...]) -> set[str]:
        if META in extensions:
            return {e for e in extensions if self.modalities.can_read(e)} | {META}
        return set(self.modalities.members_read(extensions).values())


def read_sample(sample: IndexedSample, descriptor: int, path: Path, only: Iterable[str]) -> RawSample:
    """The bytes of the members ``only`` of ``sample`` from its shard ``path``, which is open as ``descriptor``; as
    ``ShardFolder.read``."""
    extensions, wanted = tuple(sample.members), set(only)
    members = {}
    for extension, (offset, size) in sample.members.items():
        if extension not in wanted:
            continue
        members[extension] = os.pread(descriptor, size, offset)
        if len(members[extension]) != size:
            raise ValueError(
                f"{path} ended while sample {sample.key!r} was read: it was changed during the run; restore it and "
                f"resume"
            )
    unread = tuple(extension for extension in extensions if extension not in wanted)
    return RawSample(sample.key, members, str(path), unread)


def list_shards(folder: Path) -> list[Path]:
    """The shards of ``folder``, checked to exist and to have the size that ``shards.json`` names."""
    if not folder.is_dir():
        raise ValueError(f"no folder of shards at {folder}; make it by mmmoe-data shard, or correct the path")
    listing = folder / LISTING
    if not listing.is_file():
        paths = sorted(folder.glob("*.tar"))
        if not paths:
            held = names((path.name for path in sorted(folder.iterdir())), most=3) or "nothing"
            raise ValueError(f"{folder} holds no *.tar (but {held}); fill it by mmmoe-data shard, or fix the path")
        return paths
    paths = []
    for entry in read_listing(listing):
        path = listed_shard(listing, entry)
        if entry.get("filesize", path.stat().st_size) != path.stat().st_size:
            raise ValueError(
                f"shard {path} has {path.stat().st_size} bytes, but {listing.name} says "
                f"{brief(entry['filesize'])}: it is truncated or was replaced; copy or make it again"
            )
        paths.append(path)
    return paths


def read_listing(listing: Path) -> list[dict[str, Any]]:
    """The entries of a ``shards.json``."""
    remedy = "make it again by mmmoe-data shard, or remove it"
    entries = _load_json(listing, remedy).get("shardlist")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{listing} lists no shard; {remedy}")
    return entries


def listed_shard(listing: Path, entry: dict[str, Any]) -> Path:
    """The existing shard of an entry of ``listing``."""
    url = entry.get("url", "")
    if not _is_relative_name(url):
        raise ValueError(
            f"{listing} names {brief(url)}, which is not a file under {listing.parent}; only local shards are "
            f"read: copy them there and list them by their names"
        )
    path = listing.parent / url
    if not path.is_file():
        raise ValueError(f"{listing} names {url}, which does not exist; copy it, or make the shards again")
    return path


def shards_left_out(folder: Path, read: Iterable[Path]) -> Counter[str]:
    """Files of ``folder`` that look like shards and are not among ``read``: compressed, or not in ``shards.json``."""
    others = {path.name for path in folder.iterdir()} - {path.name for path in read if path.parent == folder}
    return Counter(f"*{ending[0]}" for ending in map(_LIKE_A_SHARD.search, others) if ending)


def index_path(shard: Path) -> Path:
    """The index file of ``shard`` with the positions of its members."""
    return shard.with_suffix(".index.json")


def read_index(path: Path) -> list[IndexedSample]:
    """The samples of one shard, by its sidecar where there is one, else by its headers.

    Raises ValueError that names the shard, and the key where dots belong to it.
    """
    if not path.is_file():
        raise ValueError(f"shard {path} is not a plain file; put the tar itself there")  # a pipe would never end
    sidecar = index_path(path)
    samples = _from_sidecar(sidecar, path, path.stat().st_size) if sidecar.is_file() else walk(path)
    if not samples:
        raise ValueError(f"shard {path} holds no sample; remove it, or make it again by mmmoe-data shard")
    good: set[tuple[str, ...]] = set()  # most samples have the same extensions
    for sample in samples:
        extensions = tuple(sample.members)
        if extensions not in good or any(size > MAX_MEMBER_BYTES for _, size in sample.members.values()):
            check_sample(sample, path)
            good.add(extensions)
    return samples


def _is_relative_name(url: object) -> bool:
    if not isinstance(url, str) or not url or "://" in url or "\0" in url or not url.isprintable():
        return False
    parts = Path(url).parts
    return not url.startswith("/") and ".." not in parts and all(len(part.encode()) < 256 for part in parts)


def _from_sidecar(sidecar: Path, path: Path, actual: int) -> list[IndexedSample]:
    remedy = "remove it, and the headers are read instead"
    index = _load_json(sidecar, remedy)
    if index.get("version") != 1:
        raise ValueError(f"{sidecar} has version {brief(index.get('version'))}, and 1 is read here; {remedy}")
    if index.get("bytes") != actual:
        raise ValueError(
            f"shard {path} has {actual} bytes, but its index says {brief(index.get('bytes'))}: it is "
            f"truncated or was replaced; copy or make it again"
        )
    try:
        samples = [
            IndexedSample(
                _checked_key(row["key"], sidecar),
                {extension.lower(): (start, size) for extension, (start, size) in row["members"].items()},
            )
            for row in index["samples"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = brief(f"{type(error).__name__}: {error}")
        raise ValueError(f"{sidecar} is not a shard index ({why}); {remedy}") from None
    (key, count), *_ = [*Counter(sample.key for sample in samples).most_common(1), ("", 0)]
    if count > 1:
        raise _double(key, sidecar)
    for sample in samples:
        for start, size in sample.members.values():
            if type(start) is not int or type(size) is not int or start < 0 or size < 0 or start + size > actual:
                raise ValueError(f"{sidecar} puts sample {sample.key!r} outside of {path}; {remedy}")
    return samples


def walk(path: Path) -> list[IndexedSample]:
    """The samples of a shard by one pass over its headers."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member in tar.members(path):
        key, extension = split_name(member.name)
        if not key or key.endswith("/"):  # .DS_Store, ._a.png: files of operating systems
            continue
        _checked_key(key, path)
        if key in samples and (key != next(reversed(samples)) or extension in samples[key]):
            raise _double(key, path, extension)
        samples.setdefault(key, {})[extension] = member.offset, member.size
    return [IndexedSample(key, members) for key, members in samples.items()]


def _double(key: str, path: Path, extension: str = "") -> ValueError:
    dots = f". A key ends at the first dot of a name: write {key}_{extension} for {key}.{extension}"
    return ValueError(
        f"shard {path} holds key {brief(key)} twice; the members of a sample must be adjacent and its key unique in "
        f"its shard: make it again by mmmoe-data shard{dots if '.' in extension else ''}"
    )


def _checked_key(key: object, path: Path) -> str:
    if not isinstance(key, str) or not key or "\0" in key or len(key.encode()) > MAX_KEY_BYTES:
        raise ValueError(f"{path} holds key {brief(key)}, and a key is a text of 1 to {MAX_KEY_BYTES} bytes")
    return key


def check_sample(sample: IndexedSample, path: Path) -> None:
    """Raise ValueError where dots belong to the key, or a member is too large to be read."""
    extensions = tuple(sample.members)
    if mixed := dotted_key(extensions):
        raise ValueError(
            f"shard {path} holds {len(mixed)} files of one kind under the key {sample.key!r}, which ends at the "
            f"first dot of a name: {names(mixed)}. Where those are samples of their own, make the shard again "
            f"without dots in the keys ({sample.key}_{mixed[0]}); where they belong to one sample, name the "
            f"one to read {sample.key}.{mixed[0].rpartition('.')[2]}"
        )
    for extension, (_, size) in sample.members.items():
        if size > MAX_MEMBER_BYTES and (extension == META or format_of(extension)):
            raise ValueError(
                f"shard {path} holds a file of {size} bytes in sample {sample.key!r}, and samples are read whole; "
                f"leave out what exceeds {MAX_MEMBER_BYTES} bytes"
            )


def _load_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
