"""``mmmoe-data verify``: checks shards against their indices and lists, and that they can be trained on.

Checks hashes, sizes, offsets and headers, that every sample has content and its own JSON, and that no group is in two
splits. Shards made by other tools have no list, and new ones no index: that is a note, not a problem. Every byte is
read, and nothing is decoded.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console

from data_prep.manifest import SPLITS, split_called
from data_prep.shard_files import hash_file
from mmmoe_pretrain.data.decode import BadSampleError, read_row
from mmmoe_pretrain.data.sources.index import DamagedIndex, Index
from mmmoe_pretrain.data.sources.indexing import home_of, label, places
from mmmoe_pretrain.data.sources.listing import (
    LIST,
    Listing,
    Shard,
    is_remote,
    is_stream,
    left_out,
    list_shards,
    listed_shard,
    read_list,
    refuse_compressed,
    remote_folder,
    without_ranges,
)  # fmt: skip
from mmmoe_pretrain.data.sources.members import CLASS, META, RawSample, names
from mmmoe_pretrain.data.sources.rows import read_rows
from mmmoe_pretrain.data.sources.survey import Survey, held_by
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.progress import counted, track
from mmmoe_pretrain.untrusted import brief
from mmmoe_pretrain.urls import StorageError, join, redacted

log = logging.getLogger(__name__)
_SHOWN = 50


@dataclass(slots=True)
class Seen:
    """What was found so far, over all splits."""

    shards: int = 0
    unindexed: list[str] = field(default_factory=list)  # sources without an index
    unlisted: list[str] = field(default_factory=list)  # folders without shards.json
    survey: Survey = field(default_factory=Survey)
    split_of_group: dict[str, str] = field(default_factory=dict)

    def notes(self) -> Iterator[str]:
        """Notes that are not problems."""
        if self.survey.unread:
            yield f"not read: {self.survey.left_out()}"
        if self.unlisted:
            yield f"no {LIST} in {names(self.unlisted)}: the *.tar are read in the order of their names"
        if self.unindexed:
            yield f"no index of {names(self.unindexed)}: it is made on first use, or by mmmoe-data index"


def run(folder: str) -> bool:
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
    summary = f"{counted(len(problems), 'problem')} in" if problems else "no problems in"
    content = f": {seen.survey.content()}" if seen.survey.samples else ""
    samples = f"{counted(seen.survey.samples, 'sample')} of {counted(seen.shards, 'shard')}"
    console.print(f"{summary} {samples} under {redacted(folder)}{content}", highlight=False, soft_wrap=True)
    return not problems


def split_specs(spec: str) -> list[str]:
    """The sources in ``spec``: itself, or of a local folder those in it, too, unless ``shards.json`` says what is
    read."""
    folder = Path(spec)
    if not folder.is_dir():
        return [spec]
    inside = sorted((path for path in folder.iterdir() if path.is_dir()), key=_split_order)
    candidates = [folder] if (folder / LIST).is_file() else [folder, *inside]
    found = [str(path) for path in candidates if (path / LIST).is_file() or any(path.glob("*.tar"))]
    if not found:
        for path in candidates:
            refuse_compressed(str(path), *(inside.name for inside in path.iterdir()))
        raise ValueError(f"{folder} holds no shards; `mmmoe-data shard MANIFEST --out {folder}` writes some")
    return found


def verify_folder(spec: str | Path, seen: Seen) -> Iterator[str]:
    """Every problem of the shards that ``spec`` names, one line each."""
    files = Files()
    for leftover in sorted(Path(spec).rglob("*.tmp")):
        yield f"{leftover}: left behind by a run that was killed"
    for split in split_specs(str(spec)):
        listed: dict[str, dict[str, Any]] = {}
        if is_stream(split):
            raise ValueError(
                f"{split.split()[0]}: the output of a command is read once, in its order; verify its files"
            )
        if not Path(split).is_dir():
            listing = list_shards(split, files)
            if LIST in {shard.listed_in for shard in listing.shards} and (folder := remote_folder(split)):
                yield from _verify_list(join(folder, LIST), listed, files)
        else:
            if (Path(split) / LIST).exists():
                yield from _verify_list(str(Path(split) / LIST), listed, files)
            else:
                seen.unlisted.append(split)
            urls = sorted({*map(str, Path(split).glob("*.tar")), *listed})
            beside = left_out(split, (path.name for path in Path(split).iterdir()), urls)
            listing = Listing(split, tuple(map(Shard, urls)), beside)
        seen.survey.unread.update(listing.left_out)
        with contextlib.suppress(StorageError):  # a problem of the shard, which follows
            for note in without_ranges((shard.url for shard in listing.shards), files):
                log.warning("%s", note)
        yield from _verify_shards(listing, listed, seen, files)


def _verify_shards(listing: Listing, listed: dict[str, dict[str, Any]], seen: Seen, files: Files) -> Iterator[str]:
    home, is_listed = home_of(listing), bool(listed) or (Path(listing.spec) / LIST).exists()
    index: Index | None = None
    try:
        path = next((path for path in places(listing, home) if path.exists()), None)
        index = None if path is None else Index(path)
    except DamagedIndex as error:
        yield str(error)
    if index is None:
        seen.unindexed.append(redacted(listing.spec))
    number_of = {name: number for number, name in enumerate(index.names if index else ())}
    name = Path(listing.spec).name
    for shard in track(listing.shards, f"verifying {name}", len(listing.shards), "shards"):
        seen.shards += 1
        url = redacted(shard.url)
        check = _Shard(shard.url, listed.get(shard.url), index, number_of.get(label(shard.url, home)), files)
        try:
            if is_listed and shard.url not in listed:
                yield f"{url}: not named in {LIST}"
            for problem in check.problems(seen):
                yield problem if url in problem else f"{url}: {problem}"
        except OSError as error:
            yield f"{url}: cannot be read ({error.strerror or error})"


def _split_order(folder: Path) -> tuple[int, str]:
    return SPLITS.index(folder.name) if folder.name in SPLITS else len(SPLITS), folder.name


def _verify_list(url: str, listed: dict[str, dict[str, Any]], files: Files) -> Iterator[str]:
    """Problems of ``shards.json`` itself; its shards and their entries go into ``listed``."""
    try:
        entries = read_list(url, files)
    except ValueError as error:
        yield str(error)
        return
    for entry in entries:
        try:
            listed[listed_shard(url, entry).url] = entry
        except ValueError as error:
            yield str(error)


@dataclass(slots=True)
class _Shard:
    """A shard, its entry in ``shards.json``, and its number in the index of its source, if there are any."""

    url: str
    entry: dict[str, Any] | None
    index: Index | None
    number: int | None
    files: Files

    def problems(self, seen: Seen) -> Iterator[str]:
        size, digest = self.files.stat(self.url).size, _digest(self.url, self.files)
        if self.entry is not None:
            yield from _differences(size, digest, self.entry.get("filesize"), self.entry.get("xxh3_128"))
        try:
            rows = read_rows(self.url, self.files.settings)[1]
        except ValueError as error:
            yield str(error)
            return
        if self.index is not None and self.number is not None:
            try:
                if not self.index.holds(self.number, rows):
                    yield f"{self.index.path} does not describe the members that are in the tar; remove it"
            except DamagedIndex as error:
                yield str(error)
        if self.entry is not None and self.entry.get("nsamples", len(rows)) != len(rows):
            yield f"has {counted(len(rows), 'sample')}, {LIST} says {brief(self.entry.get('nsamples'))}"
        is_ours = self.entry is not None and "xxh3_128" in self.entry
        for key, members in rows.samples():
            try:
                yield from self._sample(key, members, seen, is_ours)
            except ValueError as error:
                yield str(error)
            except BadSampleError as error:
                seen.survey.add(tuple(members))
                yield f"sample {key}: {error}"

    def _sample(self, key: str, members: dict[str, tuple[int, int]], seen: Seen, is_ours: bool) -> Iterator[str]:
        known = seen.survey.known
        chosen = known.members_read(tuple(members))
        wanted = {META, CLASS, *(chosen[name] for name in chosen if known[name].default_field)} & members.keys()
        data = {name: self.files.read(self.url, *members[name]) for name in wanted}
        raw = RawSample(key, data, self.url, tuple(name for name in members if name not in wanted))
        row = read_row(raw)
        held, named = held_by(raw, row, known, any_kind=True)
        seen.survey.add(tuple(members), 1, held, named)
        if not held:
            *most, last = known
            yield f"sample {key} has no {', '.join(most)} or {last} (its files: {names(members)})"
        if is_ours and row.get("key", key) != key:  # in shards of other tools it may be the key of anything
            yield f"sample {key} has the json of {brief(row['key'])}"
        group, split = row.get("group"), row.get("split") or Path(self.url).parent.name
        if isinstance(group, str) and group and isinstance(split, str):
            split = split_called(split)
            first = seen.split_of_group.setdefault(group, split)
            if first != split:
                yield f"sample {key} of group {group} is in {split}, another of its group in {first}"


def _digest(url: str, files: Files) -> str:
    if not is_remote(url):
        return hash_file(Path(url))
    digest = xxhash.xxh3_128()
    with files.stream(url) as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def _differences(size: int, digest: str, said_size: Any, said_digest: Any) -> Iterator[str]:
    if said_size is not None and size != said_size:
        yield f"has {size} bytes, {LIST} says {brief(said_size)}"
    elif said_digest is not None and digest != said_digest:
        yield f"xxh3_128 is {digest}, {LIST} says {brief(said_digest)}"
