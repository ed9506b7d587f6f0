"""The samples of one shard from the headers of its tar, and what makes a shard unusable."""

from __future__ import annotations

import dataclasses
from array import array

import numpy as np

from mmmoe_pretrain.data.sources import tar
from mmmoe_pretrain.data.sources.index import Kind, Rows
from mmmoe_pretrain.data.sources.members import META, dotted_key, is_leftover, names, split_name
from mmmoe_pretrain.data.storage.files import Files, ReadSettings, Stat
from mmmoe_pretrain.limits import MAX_KEY_BYTES, MAX_MEMBER_BYTES
from mmmoe_pretrain.modalities import format_of
from mmmoe_pretrain.untrusted import brief
from mmmoe_pretrain.urls import redacted


def read_rows(url: str, settings: ReadSettings | None = None) -> tuple[Stat, Rows]:
    """The samples of the shard ``url`` by its headers, and what identifies the file. Raises ValueError that names the
    shard, and the key where dots belong to it."""
    settings = settings or ReadSettings()  # of one of many shards: an outage is waited for
    patient = dataclasses.replace(settings.retries, first_attempts=settings.retries.count + 1)
    files = Files(dataclasses.replace(settings, retries=patient))
    try:
        stat, found = files.stat(url), _Samples(url)
        for member in tar.members(url, files):
            found.add(member)
        return stat, found.rows()
    finally:
        files.close()


class _Samples:
    """The samples of a shard, while its members are listed."""

    def __init__(self, url: str) -> None:
        self._url = redacted(url)
        self._seen: set[str] = set()
        self._key, self._extensions = "", list[str]()
        self._kinds: dict[Kind, int] = {}
        self._keys, self._key_end, self._kind = bytearray(), array("Q"), array("q")
        self._offset, self._size = array("Q"), array("Q")

    def add(self, member: tar.Member) -> None:
        if is_leftover(member.name):
            return
        key, extension = split_name(member.name)
        if key != self._key:
            self._end_sample()
            if len(key.encode()) > MAX_KEY_BYTES:
                raise ValueError(f"{self._url} holds key {brief(key)}, and a key has at most {MAX_KEY_BYTES} bytes")
            if key in self._seen:
                raise double_key(key, self._url, extension)
            self._key = key
            self._seen.add(key)
        elif extension in self._extensions:
            raise double_key(key, self._url, extension)
        if member.size > MAX_MEMBER_BYTES and (extension == META or format_of(extension)):
            raise ValueError(
                f"shard {self._url} holds a file of {member.size} bytes in sample {key!r}, and samples are read "
                f"whole; leave out what exceeds {MAX_MEMBER_BYTES} bytes"
            )
        self._extensions.append(extension)
        self._offset.append(member.offset)
        self._size.append(member.size)

    def rows(self) -> Rows:
        self._end_sample()
        if not self._kind:
            raise ValueError(f"shard {self._url} holds no sample; remove it, or make it again by mmmoe-data shard")
        numbers = (np.asarray(held) for held in (self._key_end, self._kind, self._offset, self._size))
        key_end, kind, offset, size = numbers
        return Rows(bytes(self._keys), key_end, tuple(self._kinds), kind, offset, size)

    def _end_sample(self) -> None:
        if not self._extensions:
            return
        kind = tuple(self._extensions)
        if kind not in self._kinds:
            check_kind(kind, self._key, self._url)
        self._kind.append(self._kinds.setdefault(kind, len(self._kinds)))
        self._keys += self._key.encode()
        self._key_end.append(len(self._keys))
        self._extensions = []


def check_kind(extensions: Kind, key: str, url: str) -> None:
    """Raise ValueError where dots belong to the key of a sample with these extensions."""
    if mixed := dotted_key(extensions):
        raise ValueError(
            f"shard {url} holds {len(mixed)} files of one kind under the key {key!r}, which ends at the first dot of "
            f"a name: {names(mixed)}. Where those are samples of their own, make the shard again without dots in the "
            f"keys ({key}_{mixed[0]}); where they belong to one sample, name the one to read "
            f"{key}.{mixed[0].rpartition('.')[2]}"
        )


def double_key(key: str, url: str, extension: str) -> ValueError:
    dots = f". A key ends at the first dot of a name: write {key}_{extension} for {key}.{extension}"
    return ValueError(
        f"shard {url} holds key {brief(key)} twice; the members of a sample must be adjacent and its key unique in "
        f"its shard: make it again by mmmoe-data shard{dots if '.' in extension else ''}"
    )
