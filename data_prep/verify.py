"""``mmmoe-data verify``: checks shards against their indices and lists, and that they can be trained on.

Checks hashes, sizes, offsets and headers, that every sample has content and its own JSON, and that no group is in two
splits. Shards made by other tools have neither lists nor indices: that is a note, not a problem. Every byte is read
once, and nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep.manifest import SPLITS, split_called
from data_prep.shard_files import hash_file
from mmmoe_pretrain.data.decode import BadSampleError, read_row
from mmmoe_pretrain.data.members import META, names
from mmmoe_pretrain.data.shards import (
    LISTING,
    IndexedSample,
    OpenShards,
    check_sample,
    index_path,
    listed_shard,
    read_listing,
    read_sample,
    shards_left_out,
    walk,
)
from mmmoe_pretrain.data.survey import Survey, held_by
from mmmoe_pretrain.progress import track
from mmmoe_pretrain.untrusted import brief, read_json

_SHOWN = 50


@dataclass(slots=True)
class Seen:
    """What was found so far, over all splits."""

    shards: int = 0
    unindexed: int = 0  # shards
    unlisted: list[str] = field(default_factory=list)  # folders without shards.json
    survey: Survey = field(default_factory=Survey)
    split_of_group: dict[str, str] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """Notes that are not problems."""
        if self.survey.unread:
            yield f"not read: {self.survey.left_out()}"
        if self.unlisted:
            yield f"no {LISTING} in {names(self.unlisted)}: the *.tar are read in the order of their names"
        if self.unindexed:
            yield f"no index beside {self.unindexed:,} shards: their headers are read at each start"


def run(folder: Path) -> bool:
    """The command: print every problem; whether there was none."""
    seen = Seen()
    problems = list(verify_folder(folder, seen))
    console = Console(markup=False)
    for problem in problems[:_SHOWN]:
        console.print(problem, highlight=False, soft_wrap=True)
    if len(problems) > _SHOWN:
        console.print(f"... and {len(problems) - _SHOWN} more")
    for note in seen.notes():
        console.print(note, highlight=False, soft_wrap=True)
    summary = f"{len(problems)} problems in" if problems else "no problems in"
    content = f": {seen.survey.content()}" if seen.survey.samples else ""
    samples = f"{seen.survey.samples:,} samples of {seen.shards:,} shards"
    console.print(f"{summary} {samples} under {folder}{content}", highlight=False, soft_wrap=True)
    return not problems


def split_folders(folder: Path) -> list[Path]:
    """The folders with shards: ``folder`` itself, and those in it unless ``shards.json`` says what is read."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    inside = sorted((path for path in folder.iterdir() if path.is_dir()), key=_split_order)
    candidates = [folder] if (folder / LISTING).is_file() else [folder, *inside]
    found = [path for path in candidates if (path / LISTING).is_file() or any(path.glob("*.tar"))]
    if not found:
        raise ValueError(f"{folder} holds no shards; `mmmoe-data shard MANIFEST --out {folder}` writes some")
    return found


def verify_folder(folder: Path, seen: Seen) -> Iterator[str]:
    """Every problem under ``folder``, one line each."""
    for leftover in sorted(folder.rglob("*.tmp")):
        yield f"{leftover}: left behind by a run that was killed"
    for split in split_folders(folder):
        listed: dict[Path, dict[str, Any]] = {}
        if (split / LISTING).exists():
            yield from _verify_list(split / LISTING, listed)
        else:
            seen.unlisted.append(str(split))
        shards = sorted({*split.glob("*.tar"), *listed})
        seen.survey.unread.update(shards_left_out(split, shards))
        for shard in track(shards, f"verifying {split.name}", len(shards), "shards"):
            seen.shards += 1
            try:
                for problem in _verify_shard(shard, listed.get(shard), seen):
                    yield problem if str(shard) in problem else f"{shard}: {problem}"
            except OSError as error:
                yield f"{shard}: cannot be read ({error.strerror})"


def _split_order(folder: Path) -> tuple[int, str]:
    return SPLITS.index(folder.name) if folder.name in SPLITS else len(SPLITS), folder.name


def _verify_list(listing: Path, listed: dict[Path, dict[str, Any]]) -> Iterator[str]:
    """Problems of ``shards.json`` itself; its shards and their entries go into ``listed``."""
    try:
        entries = read_listing(listing)
    except ValueError as error:
        yield str(error)
        return
    for entry in entries:
        try:
            listed[listed_shard(listing, entry)] = entry
        except ValueError as error:
            yield str(error)


def _verify_shard(shard: Path, entry: dict[str, Any] | None, seen: Seen) -> Iterator[str]:
    if not shard.is_file():
        yield "is not a plain file"
        return
    size, digest = shard.stat().st_size, hash_file(shard)
    index, index_name = _read_index(shard), index_path(shard).name
    if entry is not None:
        yield from _differences(size, digest, entry.get("filesize"), entry.get("xxh3_128"), LISTING)
    elif (shard.parent / LISTING).exists():
        yield f"not named in {LISTING}"
    if index is not None:
        yield from _differences(size, digest, index.get("bytes"), index.get("xxh3_128"), index_name)
    elif index_path(shard).exists():
        yield f"{index_name} is broken"
    elif entry is not None and "xxh3_128" in entry:  # mmmoe-data wrote one
        yield f"{index_name} is missing"
    else:
        seen.unindexed += 1
    try:
        walked = walk(shard)
    except ValueError as error:
        yield str(error)
        return
    if index is not None and index.get("samples") != [_entry(sample) for sample in walked]:
        yield f"{index_name} does not describe the members that are in the tar"
    if entry is not None and entry.get("nsamples", len(walked)) != len(walked):
        yield f"has {len(walked)} samples, {LISTING} says {brief(entry.get('nsamples'))}"
    if not walked:
        yield "holds no sample"
    files = OpenShards(1)
    for sample in walked:
        try:
            check_sample(sample, shard)
            yield from _verify_sample(sample, files.descriptor(shard), shard, seen, index is not None)
        except ValueError as error:
            yield str(error)
        except BadSampleError as error:
            seen.survey.add(tuple(sample.members))
            yield f"sample {sample.key}: {error}"


def _entry(sample: IndexedSample) -> dict[str, Any]:
    return {"key": sample.key, "members": {name: list(place) for name, place in sample.members.items()}}


def _differences(size: int, digest: str, said_size: Any, said_digest: Any, where: str) -> Iterator[str]:
    if said_size is not None and size != said_size:
        yield f"has {size} bytes, {where} says {brief(said_size)}"
    elif said_digest is not None and digest != said_digest:
        yield f"xxh3_128 is {digest}, {where} says {brief(said_digest)}"


def _verify_sample(sample: IndexedSample, descriptor: int, shard: Path, seen: Seen, is_ours: bool) -> Iterator[str]:
    key, known = sample.key, seen.survey.known
    chosen = known.members_read(tuple(sample.members))
    texts = {chosen[name] for name in chosen if known[name].default_field}
    raw = read_sample(sample, descriptor, shard, only={META, *texts})
    row = read_row(raw)
    held, named = held_by(raw, row, known, any_kind=True)
    seen.survey.add(tuple(sample.members), 1, held, named)
    if not held:
        *most, last = known
        yield f"sample {key} has no {', '.join(most)} or {last} (its files: {names(sample.members)})"
    if is_ours and row.get("key", key) != key:  # in shards of other tools it may be the key of anything
        yield f"sample {key} has the json of {brief(row['key'])}"
    group, split = row.get("group"), row.get("split") or shard.parent.name
    if isinstance(group, str) and group and isinstance(split, str):
        split = split_called(split)
        first = seen.split_of_group.setdefault(group, split)
        if first != split:
            yield f"sample {key} of group {group} is in {split}, another of its group in {first}"


def _read_index(shard: Path) -> dict[str, Any] | None:
    try:
        return read_json(index_path(shard))
    except (ValueError, FileNotFoundError):
        return None
