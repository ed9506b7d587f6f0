"""``mmmoe-data verify``: checks shards against their indices and lists, and that they can be trained on.

Checks hashes, sizes, offsets and headers, that every sample has content and its own JSON, and that no group is in two
splits. Shards made by other tools have no list, and new ones no index: that is a note, not a problem, and so is what
they mean by a group. Every byte is read; ``--decode`` also decodes it (``decoding.py``).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

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
from mmmoe_pretrain.data.sources.members import CLASS, META, RawSample, members_to_read, names
from mmmoe_pretrain.data.sources.rows import read_rows
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data.sources.survey import Survey, held_by
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep import console
from mmmoe_pretrain.data_prep.console import say
from mmmoe_pretrain.data_prep.decoding import count_reason, undecodable
from mmmoe_pretrain.data_prep.quality.leaks import Leaks
from mmmoe_pretrain.data_prep.rows.row import SPLITS, split_called, split_order
from mmmoe_pretrain.data_prep.rows.shards import holds_shards
from mmmoe_pretrain.data_prep.shards.building import FOLDER as BUILDING
from mmmoe_pretrain.data_prep.shards.shard_files import hash_file
from mmmoe_pretrain.progress import Progress, counted
from mmmoe_pretrain.untrusted import brief
from mmmoe_pretrain.urls import StorageError, join, redacted

log = logging.getLogger(__name__)
_SHOWN = 50  # problems that are printed
_REASONS = 20  # that are printed
MOST_KEPT = 1000  # problems of --json


@dataclass(slots=True)
class Seen:
    """What was found so far, over all splits."""

    shards: int = 0
    unindexed: list[str] = field(default_factory=list)  # sources without an index
    unlisted: list[str] = field(default_factory=list)  # folders without shards.json
    survey: Survey = field(default_factory=Survey)
    split_of_group: dict[int, str] = field(default_factory=dict)  # by a hash of its name
    foreign_leaks: list[str] = field(default_factory=list)  # the first one, in shards of other tools
    leaks: Leaks = field(default_factory=Leaks)
    whole: list[str] = field(default_factory=list)  # the shards whose samples are known
    decoded: int = 0
    bad: Counter[str] = field(default_factory=Counter)  # samples that cannot be decoded, by reason

    def notes(self) -> Iterator[str]:
        """Notes that are not problems."""
        if self.survey.unread:
            yield f"not read: {self.survey.left_out()}"
        if self.unlisted:
            yield f"no {LIST} in {names(self.unlisted)}: the *.tar are read in the order of their names"
        if self.unindexed:
            yield f"no index of {names(self.unindexed)}: it is made on first use, or by mmmoe-data index"
        if self.foreign_leaks:
            yield f"groups of other tools in several splits: {self.foreign_leaks[0]}"
        if self.decoded:
            yield f"decoded {counted(self.decoded, 'sample')}, of which {sum(self.bad.values()):,} are bad"
        yield from (f"  {count:,} {reason}" for reason, count in self.bad.most_common(_REASONS))
        yield from self.leaks.notes()


def run(folder: str, workers: int = 0, as_json: bool = False) -> bool:
    """The command: print every problem; whether there was none. ``workers``: that decode every sample; 0: none is."""
    seen, first, count = Seen(), list[str](), 0
    found = verify_folder(folder, seen)
    if workers:
        found = itertools.chain(found, _decode(seen, workers))
    for problem in found:
        count += 1
        first += [problem] if count <= MOST_KEPT else []
        if not as_json and count <= _SHOWN:
            say(problem)
    if as_json:
        console.say_json(_values(folder, seen, first, count))
        return not count
    if count > _SHOWN:
        say(f"... and {count - _SHOWN:,} more")
    for note in seen.notes():
        say(note)
    summary = f"{counted(count, 'problem')} in" if count else "no problems in"
    content = f": {seen.survey.content()}" if seen.survey.samples else ""
    samples = f"{counted(seen.survey.samples, 'sample')} of {counted(seen.shards, 'shard')}"
    say(f"{summary} {samples} under {redacted(folder)}{content}")
    return not count


def _values(folder: str, seen: Seen, first: list[str], count: int) -> dict[str, Any]:
    return {
        "path": redacted(folder),
        "problems": {"count": count, "first": first},
        "notes": list(seen.notes()),
        "shards": seen.shards,
        "samples": seen.survey.samples,
        "content": {"+".join(kind) or "nothing": number for kind, number in seen.survey.modalities.most_common()},
        "not_read": dict(seen.survey.unread),
        "decoded": seen.decoded,
        "bad": dict(seen.bad.most_common()),
    }


def _decode(seen: Seen, workers: int) -> Iterator[str]:
    """A problem for each sample that the loader cannot decode."""
    with Progress("decoding", seen.survey.samples, "samples") as progress:
        for task, bad in undecodable(seen.whole, workers):
            progress.advance(len(task.samples))
            seen.decoded += len(task.samples)
            for key, reason in bad:
                count_reason(seen.bad, reason)
                yield f"{redacted(task.url)}: sample {key}: {reason}"


def split_specs(spec: str) -> list[str]:
    """The sources in ``spec``: itself, or of a local folder those in it, too, unless ``shards.json`` says what is
    read."""
    folder = Path(spec)
    if not folder.is_dir():
        return [spec]
    inside = sorted((path for path in folder.iterdir() if path.is_dir()), key=lambda folder: split_order(folder.name))
    candidates = [folder] if (folder / LIST).is_file() else [folder, *inside]
    if found := [str(path) for path in candidates if holds_shards(path)]:
        return found
    for path in candidates:
        refuse_compressed(str(path), *(inside.name for inside in path.iterdir()))
    if (folder / BUILDING).is_dir():
        raise ValueError(f"{folder} holds shards of an unfinished command; wait for it, or repeat it to resume")
    if deeper := [str(path) for path in inside if any(map(holds_shards, filter(Path.is_dir, path.iterdir())))]:
        raise ValueError(f"{folder} holds no shards, but folders in it hold splits; name one: {names(deeper)}")
    raise ValueError(f"{folder} holds no shards; `mmmoe-data shard {folder} --out FOLDER` makes some of its files")


def split_named(spec: str, other: str) -> str:
    """The split that the folder ``spec`` is named after, or ``other``."""
    name = split_called(Path(spec.rstrip("/")).name)
    return name if name in SPLITS else other


def open_splits(specs: Iterable[str], files: Files) -> list[Indexed]:
    """The sources in ``specs``, with a warning for servers that send whole files."""
    found = [open_indexed(each, files) for spec in specs for each in split_specs(spec)]
    for note in without_ranges((url for source in found for url in source.urls), files):
        log.warning("%s", note)
    return found


def verify_folder(spec: str | Path, seen: Seen) -> Iterator[str]:
    """Every problem of the shards that ``spec`` names, one line each."""
    files = Files()
    for leftover in sorted(Path(spec).rglob("*.tmp")):
        yield f"{leftover}: left behind by a run that was killed or failed; repeat its command, or remove it"
    splits = split_specs(str(spec))
    seen.leaks.wanted = len(splits) > 1
    for split in splits:
        listed: dict[str, dict[str, Any]] = {}
        if is_stream(split):
            raise ValueError(
                f"{split.split()[0]}: the output of a command is read once, in its order; verify its files"
            )
        if not Path(split).is_dir() or not ((Path(split) / LIST).exists() or any(Path(split).glob("*.tar"))):
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
    name = Path(redacted(listing.spec)).name
    with Progress(f"verifying {name}", None if index is None else len(index), "samples") as progress:
        for number, shard in enumerate(listing.shards, 1):
            seen.shards += 1
            url, progress.what = redacted(shard.url), f"verifying {name}, shard {number} of {len(listing.shards)}"
            of_index = number_of.get(label(shard.url, home))
            check = _Shard(shard.url, listed.get(shard.url), index, of_index, files, progress)
            try:
                if is_listed and shard.url not in listed:
                    yield f"{url}: not named in {LIST}"
                for problem in check.problems(seen):
                    yield problem if url in problem else f"{url}: {problem}"
            except OSError as error:
                yield f"{url}: cannot be read ({error.strerror or error})"


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
    progress: Progress

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
        seen.whole.append(self.url)
        is_ours = self.entry is not None and "xxh3_128" in self.entry
        for key, members in rows.samples():
            self.progress.advance()
            try:
                yield from self._sample(key, members, seen, is_ours)
            except ValueError as error:
                yield str(error)
            except BadSampleError as error:
                seen.survey.add(tuple(members))
                yield f"sample {key}: {error}"

    def _sample(self, key: str, members: dict[str, tuple[int, int]], seen: Seen, is_ours: bool) -> Iterator[str]:
        known = seen.survey.known
        if seen.leaks.wanted:
            wanted = members_to_read(tuple(members), known)
        else:
            texts = (read for name, read in known.members_read(tuple(members)).items() if known[name].default_field)
            wanted = frozenset((META, CLASS, *texts))
        data = {name: self.files.read(self.url, *place) for name, place in members.items() if name in wanted}
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
        seen.leaks.add(raw, row, split_called(str(split)), known)
        if isinstance(group, str) and group and isinstance(split, str):
            split = split_called(split)
            first = seen.split_of_group.setdefault(xxhash.xxh3_64_intdigest(group.encode()), split)
            if first != split:
                leak = f"sample {key} of group {group} is in {split}, another of its group in {first}"
                if is_ours:
                    yield leak
                elif not seen.foreign_leaks:
                    seen.foreign_leaks.append(leak)


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
