"""The samples of one shard from the headers of its tar, and what makes a shard unusable."""

from __future__ import annotations

import dataclasses
import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter

import numpy as np

from mmmoe_pretrain.data.sources import tar
from mmmoe_pretrain.data.sources.index import Kind, Rows
from mmmoe_pretrain.data.sources.members import META, dotted_key, is_leftover, names, split_name
from mmmoe_pretrain.data.storage.files import Files, ReadSettings, Stat
from mmmoe_pretrain.limits import MAX_KEY_BYTES, MAX_MEMBER_BYTES
from mmmoe_pretrain.modalities import format_of
from mmmoe_pretrain.untrusted import brief
from mmmoe_pretrain.urls import redacted


class BadShard(ValueError):
    """A shard holds what another try would find again."""


def read_rows(url: str, settings: ReadSettings | None = None) -> tuple[Stat, Rows]:
    """The samples of the shard ``url`` by its headers, and what identifies the file. Raises ValueError that names the
    shard, and the key where dots belong to it."""
    settings = settings or ReadSettings()  # of one of many shards: an outage is waited for
    patient = dataclasses.replace(settings.retries, first_attempts=settings.retries.count + 1)
    files = Files(dataclasses.replace(settings, retries=patient))
    try:
        return files.stat(url), _rows(tar.members(url, files), redacted(url))
    finally:
        files.close()


def _rows(members: Iterable[tar.Member], shard: str) -> Rows:
    keys, key_end, kinds, kind = bytearray(), array("Q"), dict[Kind, int](), array("q")
    offset, size = array("Q"), array("Q")
    for key, found in samples(members, shard, lambda its: its == META or format_of(its) is not None):
        extensions = []
        for extension, member in found:
            extensions.append(extension)
            offset.append(member.offset)
            size.append(member.size)
        its = tuple(extensions)
        if its not in kinds:
            check_kind(its, key, shard)
        kind.append(kinds.setdefault(its, len(kinds)))
        keys += key.encode()
        key_end.append(len(keys))
    if not kind:
        raise BadShard(f"shard {shard} holds no sample; remove it, or make it again by mmmoe-data shard")
    return Rows(bytes(keys), np.asarray(key_end), tuple(kinds), *map(np.asarray, (kind, offset, size)))


def samples(
    members: Iterable[tar.Member], shard: str, is_known: Callable[[str], bool], most_keys: int | None = None
) -> Iterator[tuple[str, Iterator[tuple[str, tar.Member]]]]:
    """The key of each sample, and its members by their extensions, in the order of the tar. Raises BadShard where a
    key comes twice (looked for among the first ``most_keys``), or a member whose extension ``is_known`` is too large.
    """
    named = ((*split_name(member.name), member) for member in members if not is_leftover(member.name))
    seen: set[str] = set()
    for key, found in itertools.groupby(named, itemgetter(0)):
        if len(key.encode()) > MAX_KEY_BYTES:
            raise BadShard(f"{shard} holds key {brief(key)}, and a key has at most {MAX_KEY_BYTES} bytes")
        again = key in seen
        if most_keys is None or len(seen) < most_keys:
            seen.add(key)
        yield key, _members(key, found, shard, is_known, again)


def _members(
    key: str, found: Iterable[tuple[str, str, tar.Member]], shard: str, is_known: Callable[[str], bool], again: bool
) -> Iterator[tuple[str, tar.Member]]:
    before: list[str] = []
    for _, extension, member in found:
        if again or extension in before:
            dots = f". A key ends at the first dot of a name: write {key}_{extension} for {key}.{extension}"
            raise BadShard(
                f"shard {shard} holds key {brief(key)} twice; the members of a sample must be adjacent and its key "
                f"unique in its shard: unpack it, and make it again by mmmoe-data shard"
                f"{dots if '.' in extension else ''}"
            )
        if member.size > MAX_MEMBER_BYTES and is_known(extension):
            raise BadShard(
                f"shard {shard} holds a file of {member.size} bytes in sample {key!r}, and samples are read whole; "
                f"leave out what exceeds {MAX_MEMBER_BYTES} bytes"
            )
        before.append(extension)
        yield extension, member


def check_kind(extensions: Kind, key: str, shard: str) -> None:
    """Raise BadShard where dots belong to the key of a sample with these extensions."""
    if mixed := dotted_key(extensions):
        raise BadShard(
            f"shard {shard} holds {len(mixed)} files of one kind under the key {key!r}, which ends at the first dot "
            f"of a name: {names(mixed)}. Where those are samples of their own, make the shard again without dots in "
            f"the keys ({key}_{mixed[0]}); where they belong to one sample, name the one to read "
            f"{key}.{mixed[0].rpartition('.')[2]}"
        )
