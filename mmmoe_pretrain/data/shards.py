"""A folder of tar shards, read by position.

Owns opening and checking of shards (docs/data_format.md) and reading one sample's bytes. Knows
nothing of what the bytes mean. The index is a handful of arrays, whatever the number of samples.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmmoe_pretrain.data import tar
from mmmoe_pretrain.limits import MAX_KEY_BYTES, MAX_MEMBER_BYTES
from mmmoe_pretrain.untrusted import brief, read_json

EXTENSIONS = ("png", "jpg", "jpeg", "webp", "flac", "ogg", "wav", "mp3", "txt", "json")
MAX_OPEN_SHARDS = 256
_CODE = {extension: code for code, extension in enumerate(EXTENSIONS)}


@dataclass(frozen=True)
class RawSample:
    """One sample as bytes, by the extension of each member."""

    key: str
    members: dict[str, bytes]


@dataclass(frozen=True)
class _Sample:
    key: str
    members: tuple[tuple[int, int, int], ...]  # (extension code, offset, size)


class ShardFolder:
    """The samples of a folder's shards, in the order of ``shards.json`` or of the names."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._paths = list_shards(self.folder)
        counts, keys, members, lengths = [], [], [], []
        for path in self._paths:
            samples = read_index(path)
            counts.append(len(samples))
            keys.append(np.asarray([sample.key.encode() for sample in samples], dtype=np.bytes_))
            lengths += [len(sample.members) for sample in samples]
            members.append(np.asarray([m for s in samples for m in s.members], dtype=np.int64).reshape(-1, 3))
        self._first_sample = np.concatenate([[0], np.cumsum(counts)])
        self._first_member = np.concatenate([[0], np.cumsum(lengths)])
        self._members = np.concatenate(members)
        self._keys = np.concatenate(keys)
        self._refuse_duplicates()
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor, oldest first

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, i: int) -> str:
        """The key of sample ``i``."""
        return bytes(self._keys[i]).decode()

    def read(self, i: int) -> RawSample:
        """The bytes of sample ``i``. Raises ValueError where the shard has shrunk since it was opened."""
        shard = int(np.searchsorted(self._first_sample, i, side="right")) - 1
        descriptor = self._descriptor(shard)
        members = {}
        for code, offset, size in self._members[self._first_member[i] : self._first_member[i + 1]].tolist():
            data = os.pread(descriptor, size, offset)
            if len(data) != size:
                raise ValueError(
                    f"{self._paths[shard]} ended while sample {self.key(i)!r} was read: it was "
                    f"changed during the run; restore it and resume"
                )
            members[EXTENSIONS[code]] = data
        return RawSample(self.key(i), members)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= MAX_OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard] = os.open(self._paths[shard], os.O_RDONLY)
        return self._files[shard]

    def _refuse_duplicates(self) -> None:
        order = np.argsort(self._keys, kind="stable")
        same = np.flatnonzero(self._keys[order][1:] == self._keys[order][:-1])
        if same.size:
            first, second = (int(order[same[0] + step]) for step in (0, 1))
            shards = np.searchsorted(self._first_sample, [first, second], side="right") - 1
            raise ValueError(
                f"key {self.key(first)!r} stands twice, in {self._paths[shards[0]]} and "
                f"{self._paths[shards[1]]}; make the shards again with unique keys, or remove "
                f"the shard that was left over"
            )

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


def list_shards(folder: Path) -> list[Path]:
    """The shards of ``folder``, checked to exist and to have the size that ``shards.json`` names."""
    if not folder.is_dir():
        raise ValueError(f"no folder of shards at {folder}; make it by mmmoe-data shard, or correct the path")
    listing = folder / "shards.json"
    if not listing.is_file():
        paths = sorted(folder.glob("*.tar"))
        if not paths:
            raise ValueError(f"{folder} holds no *.tar; fill it by mmmoe-data shard, or correct the path")
        return paths
    remedy = "make it again by mmmoe-data shard, or remove it"
    entries = _load_json(listing, remedy).get("shardlist")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{listing} lists no shard; {remedy}")
    return [_listed_shard(folder, entry, listing) for entry in entries]


def read_index(path: Path) -> list[_Sample]:
    """The samples of one shard, by its sidecar where there is one, else by a walk over the headers."""
    if not path.is_file():
        raise ValueError(f"shard {path} is no plain file; put the tar itself there")  # a pipe would never end
    sidecar = path.with_suffix(".index.json")
    actual = path.stat().st_size
    samples = _from_sidecar(sidecar, path, actual) if sidecar.is_file() else _walk(path)
    if not samples:
        raise ValueError(f"shard {path} holds no sample; remove it, or make it again by mmmoe-data shard")
    return samples


def _listed_shard(folder: Path, entry: dict[str, Any], listing: Path) -> Path:
    url = entry.get("url", "")
    if not _is_relative_name(url):
        raise ValueError(
            f"{listing} names {brief(url)}, which is no file under {folder}; only local shards are "
            f"read: copy them there and list them by their names"
        )
    path = folder / url
    if not path.is_file():
        raise ValueError(f"{listing} names {url}, which does not exist; copy it, or make the shards again")
    if entry.get("filesize", path.stat().st_size) != path.stat().st_size:
        raise ValueError(
            f"shard {path} has {path.stat().st_size} bytes, but {listing.name} says "
            f"{brief(entry['filesize'])}: it is truncated or was replaced; copy or make it again"
        )
    return path


def _is_relative_name(url: object) -> bool:
    if not isinstance(url, str) or not url or "://" in url or "\0" in url or not url.isprintable():
        return False
    parts = Path(url).parts
    return not url.startswith("/") and ".." not in parts and all(len(part.encode()) < 256 for part in parts)


def _from_sidecar(sidecar: Path, path: Path, actual: int) -> list[_Sample]:
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
            _Sample(
                _checked_key(row["key"], sidecar),
                tuple((_CODE[ext], start, size) for ext, (start, size) in row["members"].items() if ext in _CODE),
            )
            for row in index["samples"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = brief(f"{type(error).__name__}: {error}")
        raise ValueError(f"{sidecar} is no shard index ({why}); {remedy}") from None
    for sample in samples:
        for _, start, size in sample.members:
            if type(start) is not int or type(size) is not int or start < 0 or size < 0 or start + size > actual:
                raise ValueError(f"{sidecar} puts sample {sample.key!r} outside of {path}; {remedy}")
            _check_size(sample.key, size, path)
    return samples


def _walk(path: Path) -> list[_Sample]:
    """One pass over the tar headers."""
    samples: dict[str, dict[int, tuple[int, int, int]]] = {}
    for member in tar.members(path):
        _add_member(samples, member, path)
    return [_Sample(key, tuple(members.values())) for key, members in samples.items()]


def _add_member(samples: dict[str, dict[int, tuple[int, int, int]]], member: tar.Member, path: Path) -> None:
    folder, slash, base = member.name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem:  # .DS_Store, ._a.png: what systems leave beside files
        return
    key, code = _checked_key(folder + slash + stem, path), _CODE.get(extension.lower(), -1)
    if key in samples and (key != next(reversed(samples)) or code in samples[key]):
        raise ValueError(
            f"shard {path} holds key {key!r} twice; the members of a sample must be adjacent and "
            f"its key unique: make it again by mmmoe-data shard"
        )
    members = samples.setdefault(key, {})
    if code >= 0:
        _check_size(key, member.size, path)
        members[code] = code, member.offset, member.size


def _checked_key(key: object, path: Path) -> str:
    if not isinstance(key, str) or not key or "\0" in key or len(key.encode()) > MAX_KEY_BYTES:
        raise ValueError(f"{path} holds key {brief(key)}, and a key is a text of 1 to {MAX_KEY_BYTES} bytes")
    return key


def _check_size(key: str, size: int, path: Path) -> None:
    if size > MAX_MEMBER_BYTES:
        raise ValueError(
            f"shard {path} holds a file of {size} bytes in sample {key!r}, and samples are read whole; leave out "
            f"what exceeds {MAX_MEMBER_BYTES} bytes"
        )


def _load_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
