"""``mmmoe-data dedup``: exact and near duplicates within shards, between their splits, and of held-out samples."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.console import answer
from data_prep.quality.repeats import HELD_OUT, find_repeats, totals
from data_prep.quality.report import Found, is_list, label, read_hashes, refuse_name, write_hashes, write_report
from data_prep.quality.samples import Settings, read_samples
from data_prep.reshard import Part, reshard, split_named
from data_prep.shards.building import Building
from data_prep.shards.writing import ShardOptions
from data_prep.verify import split_specs
from mmmoe_pretrain.data.sources.listing import without_ranges
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.progress import Progress, counted

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """``report``, ``hashes``: files to write; None: none; ``out``, ``quarantine``: folders for shards of the samples
    that remain, and of those that are dropped."""

    against: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    report: Path | None = None
    hashes: Path | None = None
    out: Path | None = None
    quarantine: Path | None = None
    number_keys: bool = False
    overwrite: bool = False
    workers: int = 2


def run(specs: Sequence[str], options: Options, as_json: bool = False) -> None:
    """The command: compare, write what is asked for, and print a summary."""
    files = [path for path in (options.report, options.hashes) if path]
    for path in files:
        refuse_name(path)
    folders = options.out, options.quarantine
    for out in filter(None, folders):  # refused now, not after hours of reading
        Building(out, options.overwrite)
    found = dedup(specs, options)
    if options.report:
        write_report(options.report, found)
    if options.hashes:
        write_hashes(options.hashes, found)
    for folder, is_kept in zip(folders, (True, False), strict=True):
        if folder and write_samples(found, folder, is_kept, options):
            files.append(folder)
    answer(as_json, to_json(found, files), *summary(found), *(f"written: {path}" for path in files))


def to_json(found: Found, written: Sequence[Path]) -> dict[str, Any]:
    """The summary for a script."""
    own, near = int((~found.samples.held_out()).sum()), int(found.repeats.near[found.dropped].sum())
    between = totals(found.samples, found.repeats)
    return {
        "samples": own,
        "by": ["+".join(entry) for entry in found.settings.by],
        "exact": len(found.dropped) - near,
        "near": near,
        "remain": own - len(found.dropped),
        "between": [
            {"split": split, "of": other, "exact": total.exact, "near": total.near}
            for (split, other), total in sorted(between.items())
        ],
        "not_compared": dict(found.samples.problems),
        "written": list(map(str, written)),
    }


def dedup(specs: Sequence[str], options: Options) -> Found:
    """Compare the samples of shards with each other, and with held-out ones."""
    files = Files()
    lists = [(name, read_hashes(Path(name))) for name in options.against if is_list(name)]
    held = [source for name in options.against if not is_list(name) for source in _opened(name, files)]
    own: list[Indexed] = []
    for source in (source for spec in specs for source in _opened(spec, files)):
        shards = {*map(label, source.urls)}
        if any(shards == {*map(label, other.urls)} for other in held):
            continue  # a split of a folder that is held out
        if twice := {label(url) for other in (*held, *own) for url in other.urls} & shards:
            raise ValueError(f"{min(twice)} is named twice; name each shard once")
        own.append(source)
    if not own:
        raise ValueError("--against holds all of these shards; name others to compare with it")
    for note in without_ranges((url for source in (*held, *own) for url in source.urls), files):
        log.warning("%s", note)
    both = [*((source, True) for source in held), *((source, False) for source in own)]
    samples = read_samples(both, lists, options.settings, options.workers)
    with Progress("comparing"):
        return Found(samples, find_repeats(samples, options.settings), options.settings)


def write_samples(found: Found, out: Path, is_kept: bool, options: Options) -> bool:
    """The samples that are kept, or those that are dropped, as shards, their files byte for byte; whether there are
    any."""
    parts = []
    for source in found.samples.sources:
        if source.shards is not None and not source.is_held_out:
            mask = (found.repeats.of[source.first : source.first + source.count] < 0) == is_kept
            parts.append(Part(source.shards, split_named(source.shards.spec), mask))
    if not any(len(part.numbers) for part in parts):
        return False
    settings = ShardOptions(workers=options.workers, max_bad_fraction=0, overwrite=options.overwrite)
    reshard(parts, out, settings, number_keys=options.number_keys)
    return True


def _opened(spec: str, files: Files) -> list[Indexed]:
    return [open_indexed(each, files) for each in split_specs(spec)]


def summary(found: Found) -> Iterator[str]:
    """How many duplicates there are, where, and examples of those between splits."""
    samples, is_near = found.samples, found.settings.near
    own, near = int((~samples.held_out()).sum()), int(found.repeats.near[found.dropped].sum())
    entries = ", ".join("+".join(entry) for entry in found.settings.by)
    counts = f"{len(found.dropped) - near:,} exact" + f" and {near:,} near" * is_near
    left = own - len(found.dropped)
    yield f"{counted(own, 'sample')} compared by {entries}: {counts} duplicates, {left:,} samples remain"
    for (split, other), total in sorted(totals(samples, found.repeats).items()):
        numbers, where = f"{total.exact:,} exact" + f" and {total.near:,} near" * is_near, split or "(no split)"
        if split == other:
            yield f"within {where}: {numbers}"
            continue
        what = "held out" if other == HELD_OUT else "leak" if split and other else "between"
        examples = "; ".join(_example(found, number) for number in total.examples)
        yield f"{what}: {numbers} duplicates in {where} of samples in {other or '(no split)'}, such as {examples}"
    for reason, count in samples.problems.items():
        yield f"{reason}: {count:,}"


def _example(found: Found, number: int) -> str:
    places = (found.place(each) for each in (number, int(found.repeats.of[number])))
    return ", which repeats ".join(f"{key} of {'/'.join(Path(shard).parts[-2:])}" for shard, _, key in places)
