"""``mmmoe-data verify``: whether shards are what their indices and lists say.

Checks hashes, sizes, offsets and headers, that every sample has a known modality and a fitting JSON,
and that no key occurs twice and no group in two splits. Reads every byte once; decodes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console

from data_prep.manifest import SPLITS
from data_prep.media import AUDIO_SUFFIXES, IMAGE_SUFFIXES
from data_prep.progress import track
from data_prep.shard_files import LIST_NAME, hash_file, index_path, walk_shard
from mmmoe_pretrain.limits import MAX_META_BYTES, MAX_TEXT_BYTES, has_text
from mmmoe_pretrain.untrusted import brief, parse_json, read_json

_MODALITY_SUFFIXES = frozenset({*IMAGE_SUFFIXES.values(), *AUDIO_SUFFIXES.values(), "txt"})
_SHOWN = 50


@dataclass(slots=True)
class Seen:
    """What was met so far, over all splits."""

    shards: int = 0
    keys: dict[str, str] = field(default_factory=dict)  # key -> shard
    split_of_group: dict[str, str] = field(default_factory=dict)


def run(folder: Path) -> bool:
    """The command: print every problem; whether there was none."""
    seen = Seen()
    problems = list(verify_folder(folder, seen))
    console = Console()
    for problem in problems[:_SHOWN]:
        console.print(problem, highlight=False, markup=False, soft_wrap=True)
    if len(problems) > _SHOWN:
        console.print(f"... and {len(problems) - _SHOWN} more")
    verdict = f"{len(problems)} problems in" if problems else "all is well in"
    console.print(f"{verdict} {len(seen.keys):,} samples of {seen.shards:,} shards under {folder}", highlight=False)
    return not problems


def split_folders(folder: Path) -> list[Path]:
    """The folders that hold shards: ``folder`` itself, or its splits."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    found = [
        path
        for path in (folder, *(folder / split for split in SPLITS))
        if (path / LIST_NAME).is_file() or any(path.glob("*.tar"))
    ]
    if not found:
        raise ValueError(f"{folder} holds no shards; `mmmoe-data shard MANIFEST --out {folder}` writes some")
    return found


def verify_folder(folder: Path, seen: Seen) -> Iterator[str]:
    """Every problem under ``folder``, one line each."""
    for leftover in sorted(folder.rglob("*.tmp")):
        yield f"{leftover}: left behind by a run that was killed"
    for split in split_folders(folder):
        listed: dict[str, dict[str, Any]] = {}
        yield from _verify_list(split, listed)
        shards = sorted(split.glob("*.tar"))
        for shard in track(shards, f"verifying {split.name}", len(shards), "shards"):
            seen.shards += 1
            for problem in _verify_shard(shard, listed.get(shard.name), seen):
                yield f"{shard}: {problem}"


def _verify_list(folder: Path, listed: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Problems of ``shards.json`` itself; its entries go into ``listed``."""
    path = folder / LIST_NAME
    try:
        entries = {entry["url"]: dict(entry) for entry in read_json(path)["shardlist"]}
        listed.update({name: entry for name, entry in entries.items() if isinstance(name, str)})
    except FileNotFoundError:
        yield f"{path}: missing"
    except (ValueError, KeyError, TypeError) as error:
        yield f"{path}: not a list of shards ({brief(str(error))})"
    present = {file.name for file in folder.iterdir()}
    for name in listed:
        if name not in present:
            yield f"{folder}/{name[:200]}: named in {LIST_NAME} and missing"


def _verify_shard(shard: Path, entry: dict[str, Any] | None, seen: Seen) -> Iterator[str]:
    if not shard.is_file():
        yield "is no plain file"
        return
    size, digest = shard.stat().st_size, hash_file(shard)
    index, index_name = _read_index(shard), index_path(shard).name
    if entry is None:
        yield f"not named in {LIST_NAME}"
    else:
        yield from _differences(size, digest, entry.get("filesize"), entry.get("xxh3_128"), LIST_NAME)
    if index is None:
        yield f"{index_name} is missing or broken"
    else:
        yield from _differences(size, digest, index.get("bytes"), index.get("xxh3_128"), index_path(shard).name)
    try:
        walked = walk_shard(shard)
    except ValueError as error:
        yield str(error)
        return
    if index is not None and index.get("samples") != walked:
        yield f"{index_name} does not describe the members that are in the tar"
    if entry is not None and entry.get("nsamples") != len(walked):
        yield f"has {len(walked)} samples, {LIST_NAME} says {brief(entry.get('nsamples'))}"
    with shard.open("rb") as file:
        for sample in walked:
            yield from _verify_sample(sample, file, shard, seen)


def _differences(size: int, digest: str, said_size: Any, said_digest: Any, where: str) -> Iterator[str]:
    if size != said_size:
        yield f"has {size} bytes, {where} says {brief(said_size)}"
    elif digest != said_digest:
        yield f"xxh3_128 is {digest}, {where} says {brief(said_digest)}"


def _verify_sample(sample: dict[str, Any], file: BinaryIO, shard: Path, seen: Seen) -> Iterator[str]:
    key, members = sample["key"], sample["members"]
    if key in seen.keys:
        yield f"key {key} is also in {seen.keys[key]}, or its members are not adjacent"
    seen.keys[key] = str(shard)
    present = _MODALITY_SUFFIXES & members.keys()
    if present == {"txt"} and members["txt"][1] <= MAX_TEXT_BYTES:
        file.seek(members["txt"][0])
        if not has_text(file.read(members["txt"][1]).decode(errors="replace")):
            present = frozenset()
    if not present:
        yield f"sample {key} has no image, audio or text"
    if unknown := sorted(members.keys() - _MODALITY_SUFFIXES - {"json"}):
        yield f"sample {key} has members of unknown kind: {', '.join(unknown)}"
    if "json" not in members:
        yield f"sample {key} has no json"
        return
    offset, size = members["json"]
    if size > MAX_META_BYTES:
        yield f"sample {key} has a json of {size} bytes, more than {MAX_META_BYTES}"
        return
    file.seek(offset)
    try:
        fields = parse_json(file.read(size), "it")
        found, group, split = fields["key"], fields["group"] or key, fields["split"]
    except (ValueError, KeyError, TypeError) as error:
        yield f"sample {key} has a json that cannot be read ({brief(str(error))})"
        return
    if not isinstance(group, str) or not isinstance(split, str):
        yield f"sample {key} has a json whose group or split is no text"
        return
    if found != key:
        yield f"sample {key} has the json of {brief(found)}"
    first = seen.split_of_group.setdefault(group, split)
    if first != split:
        yield f"sample {key} of group {group} is in {split}, another of its group in {first}"


def _read_index(shard: Path) -> dict[str, Any] | None:
    try:
        return read_json(index_path(shard))
    except (ValueError, FileNotFoundError):
        return None
