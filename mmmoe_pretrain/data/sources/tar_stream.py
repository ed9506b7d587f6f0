"""The samples of one shard, read on from its beginning: for shards that cannot be read by ranges.

The rules are those of indexed shards (``tar.py``, ``rows.py``). Files that no modality reads, and all files of a
sample that is skipped, pass without being kept.
"""

from __future__ import annotations

from collections.abc import Iterator

from mmmoe_pretrain.data.sources import tar
from mmmoe_pretrain.data.sources.members import CLASS, META, RawSample, members_to_read, names
from mmmoe_pretrain.data.sources.pipes import open_once
from mmmoe_pretrain.data.sources.rows import BadShard, check_kind, samples
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.modalities import Modalities, format_of
from mmmoe_pretrain.urls import redacted_command

MAX_KEYS_SEEN = 1 << 18  # of a shard; equal keys that lie further apart are not found


class ShardSamples:
    """The samples of the shard ``url`` in order. ``close`` ends its command."""

    def __init__(self, url: str, files: Files, modalities: Modalities) -> None:
        self.name = redacted_command(url)
        self.count = 0  # samples that ``next`` has given
        self._modalities = modalities
        self._stream, self._raw = open_once(url, files)
        self._read, self._keep = tar.reading_on(self._stream), False
        self._wanted: dict[tuple[str, ...], frozenset[str]] = {}  # of a sample's extensions, those that are read
        self._samples = self._read_on()

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

    def _read_on(self) -> Iterator[RawSample]:
        def is_known(extension: str) -> bool:
            return self._is_read(extension) or format_of(extension) is not None

        for key, members in samples(tar.walk(self._read, self.name), self.name, is_known, MAX_KEYS_SEEN):
            data: dict[str, bytes | None] = {}
            keep = self._keep
            for extension, member in members:  # short data: the next header is not there
                read = keep and self._is_read(extension)
                data[extension] = self._read(member.offset, member.size) if read else None
            extensions = tuple(data)
            if extensions not in self._wanted:
                self._check(extensions, key)
                self._wanted[extensions] = members_to_read(extensions, self._modalities)
            wanted = self._wanted[extensions]
            held = {name: its for name, its in data.items() if name in wanted and its is not None}
            yield RawSample(key, held, self.name, tuple(name for name in extensions if name not in wanted))
        if not self._wanted:
            raise BadShard(f"shard {self.name} holds no sample; leave it out of data.train")

    def _is_read(self, extension: str) -> bool:
        return extension in (META, CLASS) or self._modalities.can_read(extension)

    def _check(self, extensions: tuple[str, ...], key: str) -> None:
        """Raise BadShard where dots belong to the key, or only the alphabet would decide which member is read."""
        check_kind(extensions, key, self.name)
        tied = None if META in extensions else self._modalities.tied(extensions)
        if tied is not None:
            name, members = tied
            raise BadShard(
                f"sample {key!r} of {self.name} has {names(members)}, and one of them is read as {name}: name "
                f"it, e.g. modalities.{name}.members: [{members[0]}]"
            )
