"""Samples of one split that are in another, too, whatever their keys: what ``mmmoe-data verify`` notes.

All media of a sample count, so an image with another caption is another sample; ``dedup`` compares by one of them.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from mmmoe_pretrain.data.decode import PARTS, BadSampleError
from mmmoe_pretrain.data.sources.members import RawSample
from mmmoe_pretrain.data.sources.rows import read_rows
from mmmoe_pretrain.data_prep.quality.samples import document_digest, media_of
from mmmoe_pretrain.data_prep.rows.row import SPLITS
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.progress import counted
from mmmoe_pretrain.urls import redacted


@dataclass(slots=True)
class Leaks:
    """Samples with their splits: of each a hash of its content, its split, its shard and its key's hash, 21 bytes.
    ``wanted``: whether there are several splits, so that their files are read."""

    wanted: bool = False
    _shards: list[str] = field(default_factory=list)
    _content: array[int] = field(default_factory=lambda: array("Q"))
    _key: array[int] = field(default_factory=lambda: array("Q"))
    _shard: array[int] = field(default_factory=lambda: array("I"))
    _split: bytearray = field(default_factory=bytearray)

    def add(self, raw: RawSample, row: dict[str, Any], split: str, modalities: Modalities) -> None:
        """A sample of the shard ``raw.shard`` with its JSON ``row``."""
        if not self.wanted or split not in SPLITS:
            return
        try:
            content = _digest(raw, row, modalities)
        except BadSampleError:  # verify has said so
            content = None
        if content is None:
            return
        if not self._shards or self._shards[-1] != raw.shard:
            self._shards.append(raw.shard)
        self._content.append(content)
        self._key.append(_hash(raw.key.encode()))
        self._shard.append(len(self._shards) - 1)
        self._split.append(SPLITS.index(split))

    def notes(self) -> Iterator[str]:
        """A line for each two splits that share samples, with an example."""
        content = np.frombuffer(self._content, np.uint64)
        split = np.frombuffer(bytes(self._split), np.uint8)
        for first, second in itertools.combinations(range(len(SPLITS)), 2):
            mine = np.flatnonzero(split == second)
            found = mine[np.isin(content[mine], content[split == first])]
            if not len(found):
                continue
            example = int(found[0])
            same = int(np.flatnonzero((content == content[example]) & (split == first))[0])
            count = f"{counted(len(found), 'sample')} of {SPLITS[second]} {'is' if len(found) == 1 else 'are'}"
            examples = f"{self._named(example)}, which is {self._named(same)}"
            yield f"{count} in {SPLITS[first]}, too, such as {examples}; mmmoe-data dedup finds all"

    def _named(self, number: int) -> str:
        url = self._shards[self._shard[number]]
        keys = (key for key, _ in read_rows(url)[1].samples() if _hash(key.encode()) == self._key[number])
        return f"{next(keys, '(gone)')} in {redacted(url)}"


def _digest(raw: RawSample, row: dict[str, Any], modalities: Modalities) -> int | None:
    if PARTS in row:
        return _hash(document_digest(raw, row, modalities))
    media = media_of(raw, row, modalities)
    digest = xxhash.xxh3_64()
    for name, data in sorted(media.items()):
        digest.update(f"{name} {len(data)} ".encode())
        digest.update(data)
    return digest.intdigest() if media else None


def _hash(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)
