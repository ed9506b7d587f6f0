"""The samples of one shard, read on from its beginning: for shards that cannot be read by ranges.

The rules are those of indexed shards (``tar.py``, ``members.py``). Files that no modality reads, and all files of a
sample that is skipped, pass without being kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from mmmoe_pretrain.data.sources import tar
from mmmoe_pretrain.data.sources.members import (
    CLASS,
    META,
    RawSample,
    is_leftover,
    members_to_read,
    names,
    split_name,
)
from mmmoe_pretrain.data.sources.pipes import open_once
from mmmoe_pretrain.data.sources.rows import check_kind, double_key
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.limits import MAX_KEY_BYTES, MAX_MEMBER_BYTES
from mmmoe_pretrain.modalities import Modalities, format_of
from mmmoe_pretrain.untrusted import brief
from mmmoe_pretrain.urls import redacted_command

MAX_KEYS_SEEN = 1 << 18  # of a shard, by hash; equal keys that lie further apart are not found


class BadShard(ValueError):
    """A shard holds what another try would find again."""


@dataclass
class _Sample:
    key: str
    keep: bool
    extensions: list[str] = field(default_factory=list)
    members: dict[str, bytes] = field(default_factory=dict)


class ShardSamples:
    """The samples of the shard ``url`` in order. ``close`` ends its command."""

    def __init__(self, url: str, files: Files, modalities: Modalities) -> None:
        self.name = redacted_command(url)
        self.count = 0  # samples that ``next`` has given
        self._modalities = modalities
        self._stream, self._raw = open_once(url, files)
        self._read, self._keep = tar.reading_on(self._stream), False
        self._seen: set[int] = set()
        self._kinds: set[tuple[str, ...]] = set()  # that were checked
        self._samples = self._grouped()

    def next(self, keep: bool = True) -> RawSample | None:
        """The next sample, None at the end; without ``keep`` it has no members.

        Raises TransientError, EOFError or ValueError where reading the shard again may help, else BadShard or
        StorageError.
        """
        self._keep = keep
        sample = next(self._samples, None)
        self.count += sample is not None
        return sample

    def close(self) -> None:
        self._stream.close()
        self._raw.close()

    def _grouped(self) -> Iterator[RawSample]:
        sample: _Sample | None = None
        for member in tar.walk(self._read, self.name):
            if is_leftover(member.name):
                continue
            key, extension = split_name(member.name)
            if sample is None or key != sample.key:
                if sample is not None:
                    yield self._ended(sample)
                sample = self._begun(key, extension)
            elif extension in sample.extensions:
                raise BadShard(str(double_key(key, self.name, extension)))
            self._add(sample, extension, member)
        if sample is None:
            raise BadShard(f"shard {self.name} holds no sample; leave it out of data.train")
        yield self._ended(sample)

    def _begun(self, key: str, extension: str) -> _Sample:
        if len(key.encode()) > MAX_KEY_BYTES:
            raise BadShard(f"{self.name} holds key {brief(key)}, and a key has at most {MAX_KEY_BYTES} bytes")
        if hash(key) in self._seen:
            raise BadShard(str(double_key(key, self.name, extension)))
        if len(self._seen) < MAX_KEYS_SEEN:
            self._seen.add(hash(key))
        return _Sample(key, self._keep)

    def _add(self, sample: _Sample, extension: str, member: tar.Member) -> None:
        known = extension in (META, CLASS) or format_of(extension) is not None
        if member.size > MAX_MEMBER_BYTES and (known or self._modalities.can_read(extension)):
            raise BadShard(
                f"shard {self.name} holds a file of {member.size} bytes in sample {sample.key!r}, and samples are "
                f"read whole; leave out what exceeds {MAX_MEMBER_BYTES} bytes"
            )
        sample.extensions.append(extension)
        if sample.keep and (extension in (META, CLASS) or self._modalities.can_read(extension)):
            sample.members[extension] = self._read(member.offset, member.size)  # short: the next header is not there

    def _ended(self, sample: _Sample) -> RawSample:
        extensions = tuple(sample.extensions)
        if extensions not in self._kinds:
            self._check(extensions, sample.key)
            self._kinds.add(extensions)
        wanted = members_to_read(extensions, self._modalities)
        read = {extension: data for extension, data in sample.members.items() if extension in wanted}
        return RawSample(sample.key, read, self.name, tuple(e for e in extensions if e not in wanted))

    def _check(self, extensions: tuple[str, ...], key: str) -> None:
        """Raise BadShard where dots belong to the key, or only the alphabet would decide which member is read."""
        try:
            check_kind(extensions, key, self.name)
        except ValueError as error:
            raise BadShard(str(error)) from None
        tied = None if META in extensions else self._modalities.tied(extensions)
        if tied is not None:
            name, members = tied
            raise BadShard(
                f"sample {key!r} of {self.name} has {names(members)}, and one of them is read as {name}: name "
                f"it, e.g. modalities.{name}.members: [{members[0]}]"
            )
