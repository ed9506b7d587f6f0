"""One shard: a tar whose bytes depend on its samples alone; and the list of a folder's shards.

Writes ``NNNNN.tar`` and ``shards.json`` (docs/data_format.md), independent of manifests and media.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from mmmoe_pretrain.data.sources.listing import LIST


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A key and its members, suffix -> bytes, in the order in which they are stored."""

    key: str
    members: Mapping[str, bytes]


class BadSample(NamedTuple):
    """A key and why it has no sample."""

    key: str
    reason: str


def write_shard(path: Path, samples: Iterable[EncodedSample]) -> dict[str, Any]:
    """Write a shard; returns its line of ``shards.json``."""
    partial, count = path.with_name(path.name + ".tmp"), 0
    with partial.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for sample in samples:
                for name, data in sample.members.items():
                    add_file(tar, f"{sample.key}.{name}", data)
                count += 1
        file.flush()
        os.fsync(file.fileno())
    size, digest = partial.stat().st_size, hash_file(partial)
    partial.replace(path)
    return {"url": path.name, "nsamples": count, "filesize": size, "xxh3_128": digest}


def write_shard_list(folder: Path, entries: list[dict[str, Any]]) -> None:
    write_json(folder / LIST, {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": entries})


def write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    partial.replace(path)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def add_file(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a file whose header depends on its name and size alone."""
    info = tarfile.TarInfo(name)  # mtime, uid and gid are 0
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))
