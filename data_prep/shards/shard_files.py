"""One shard: a tar whose bytes depend on its samples alone; and the list of a folder's shards.

Writes ``SPLIT-NNNNNN.tar`` and ``shards.json`` (docs/data_format.md), independent of rows and media.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from tarfile import LENGTH_NAME, RECORDSIZE, TarInfo
from typing import Any

import xxhash

from mmmoe_pretrain.data.sources.listing import LIST
from mmmoe_pretrain.data_prep.shards.encode import EncodedSample

BLOCK = 512  # bytes: a header, and what contents are filled up to


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:06d}.tar"


class ShardWriter:
    """A shard that is being written, to ``NAME.tmp`` until it is closed. ``size``: the bytes it will have, less its
    end."""

    def __init__(self, path: Path) -> None:
        from webdataset.writer import TarWriter  # takes a second to import

        self.path, self.count, self.size = path, 0, 0
        self._partial = path.with_name(path.name + ".tmp")
        self._file = self._partial.open("wb")
        self._tar = TarWriter(
            self._file, user="", group="", mode=0o644, encoder=False, keep_meta=True, mtime=0
        )  # keep_meta: files whose suffix begins with _

    def add(self, sample: EncodedSample) -> None:
        self._tar.write({"__key__": sample.key, **sample.members})
        self.count += 1
        self.size += tar_bytes(sample)

    def close(self) -> dict[str, Any]:
        """The shard takes its name; returns its line of ``shards.json``."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        size, digest = self._partial.stat().st_size, hash_file(self._partial)
        self._partial.replace(self.path)
        return {"url": self.path.name, "nsamples": self.count, "filesize": size, "xxh3_128": digest}

    def abandon(self) -> None:
        """Give up the file, unless it is closed."""
        with contextlib.suppress(OSError, ValueError):  # a full disk; nothing more can be written after a close
            self._tar.close()
        self._file.close()


def tar_bytes(sample: EncodedSample) -> int:
    """What a sample takes in a tar."""
    return members_in_tar(sample.key, {name: len(data) for name, data in sample.members.items()})


def members_in_tar(key: str, sizes: Mapping[str, int]) -> int:
    """What a sample with members of these ``sizes`` takes in a tar."""
    return sum(_header_bytes(f"{key}.{name}") + -(-size // BLOCK) * BLOCK for name, size in sizes.items())


def _header_bytes(name: str) -> int:
    is_short = len(name) <= LENGTH_NAME and name.isascii()
    return BLOCK if is_short else len(TarInfo(name).tobuf())


def tar_size(held: int) -> int:
    """The bytes of a tar whose samples take ``held``, with its end."""
    return -(-(held + 2 * BLOCK) // RECORDSIZE) * RECORDSIZE


def write_shard(path: Path, samples: Iterable[EncodedSample]) -> dict[str, Any]:
    """Write a shard; returns its line of ``shards.json``."""
    writer = ShardWriter(path)
    try:
        for sample in samples:
            writer.add(sample)
        return writer.close()
    finally:
        writer.abandon()


def write_shard_list(folder: Path, entries: list[dict[str, Any]]) -> None:
    write_json(folder / LIST, {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": entries})


def write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    partial.replace(path)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
