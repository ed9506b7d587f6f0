"""``mmmoe-data dedup``: exact and near duplicates within shards, between their splits, and of held-out samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmmoe_pretrain.data.sources.source import Indexed
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.data_prep.console import answer
from mmmoe_pretrain.data_prep.quality.repeats import HELD_OUT, find_repeats, totals
from mmmoe_pretrain.data_prep.quality.report import (
    Found,
    is_list,
    label,
    read_hashes,
    refuse_name,
    write_hashes,
    write_report,
)
from mmmoe_pretrain.data_prep.quality.samples import DOCUMENT, Settings, read_samples
from mmmoe_pretrain.data_prep.reshard import Part, reshard
from mmmoe_pretrain.data_prep.shards.building import Building
from mmmoe_pretrain.data_prep.shards.writing import ShardOptions
from mmmoe_pretrain.data_prep.verify import open_splits, split_named
from mmmoe_pretrain.progress import Progress, counted


@dataclass(frozen=True, slots=True)
class Options:
    """``report``, ``hashes``: files to write; None: none; ``out``, ``quarantine``: folders for shards of the samples
    that remain, and of those that are dropped, which a ``dry_run`` does not write."""

    against: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    report: Path | None = None
    hashes: Path | None = None
    out: Path | None = None
    quarantine: Path | None = None
    number_keys: bool = False
    overwrite: bool = False
    dry_run: bool = False
    workers: int = 2


def run(specs: Sequence[str], options: Options, as_json: bool = False) -> None:
    """The command: compare, write what is asked for, and print a summary."""
    files = [path for path in (options.report, options.hashes) if path]
    for path in files:
        refuse_name(path)
    # The dropped ones first: --out may replace the shards that are read.
    folders = [(path, is_kept) for path, is_kept in ((options.quarantine, False), (options.out, True)) if path]
    if len({path.resolve() for path, _ in folders}) < len(folders):
        raise ValueError(f"--out and --quarantine are both {options.out}; name two folders")
    for path, _ in folders:  # refused now, not after hours of reading
        Building(path, options.overwrite)
    found = dedup(specs, options)
    if options.report:
        write_report(options.report, found)
    if options.hashes:
        write_hashes(options.hashes, found)
    lines = [f"wrote {path}" for path in files]
    for path, is_kept in folders:
        count = write_samples(found, path, is_kept, options)
        if count and not options.dry_run:
            files.append(path)
        verb = "would write" if options.dry_run else "wrote" if count else "did not write"
        lines.append(f"{verb} {path}: {counted(count, 'sample')}")
    if not folders:
        lines.append("no shards were written; --out FOLDER writes those of the samples that remain")
    answer(as_json, to_json(found, files), *summary(found), *lines)


def to_json(found: Found, written: Sequence[Path]) -> dict[str, Any]:
    """The summary for a script."""
    own, exact, near = found.counts()
    between = totals(found.samples, found.repeats)
    return {
        "samples": own,
        "by": ["+".join(entry) for entry in found.settings.by],
        "exact": exact,
        "near": near,
        "remain": own - exact - near,
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
    held = open_splits([name for name in options.against if not is_list(name)], files)
    own: list[Indexed] = []
    for source in open_splits(specs, files):
        shards = {*map(label, source.urls)}
        if any(shards == {*map(label, other.urls)} for other in held):
            continue  # a split of a folder that is held out
        if twice := {label(url) for other in (*held, *own) for url in other.urls} & shards:
            raise ValueError(f"{min(twice)} is named twice; name each shard once")
        own.append(source)
    if not own:
        raise ValueError("--against holds all of these shards; name others to compare with it")
    both = [*((source, True) for source in held), *((source, False) for source in own)]
    samples = read_samples(both, lists, options.settings, options.workers)
    with Progress("comparing"):
        return Found(samples, find_repeats(samples, options.settings), options.settings)


def write_samples(found: Found, out: Path, is_kept: bool, options: Options) -> int:
    """Write the samples that are kept, or those that are dropped, as shards, their files byte for byte; how many."""
    parts = []
    for source in found.samples.sources:
        if source.shards is not None and not source.is_held_out:
            mask = (found.repeats.of[source.first : source.first + source.count] < 0) == is_kept
            parts.append(Part(source.shards, split_named(source.shards.spec, "train"), mask))
    count = sum(len(part.numbers) for part in parts)
    if count and not options.dry_run:
        settings = ShardOptions(workers=options.workers, max_bad_fraction=0, overwrite=options.overwrite)
        reshard(parts, out, settings, number_keys=options.number_keys)
    return count


def summary(found: Found) -> Iterator[str]:
    """How many duplicates there are, where, and examples of those between splits."""
    samples, is_near = found.samples, found.settings.near
    own, exact, near = found.counts()
    entries = ", ".join("+".join(entry) for entry in found.settings.by)
    counts, left = f"{exact:,} exact" + f" and {near:,} near" * is_near, own - exact - near
    yield f"{counted(own, 'sample')} compared by {entries}: {counts} duplicates, {counted(left, 'sample')} remain"
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
    alone = [form for form, entry in enumerate(found.settings.by) if entry == ("audio",)]
    if is_near and np.isin(samples.records["form"], [*alone, DOCUMENT]).any():
        yield "audio and documents were compared exactly: they have no near duplicates"


def _example(found: Found, number: int) -> str:
    places = (found.place(each) for each in (number, int(found.repeats.of[number])))
    return ", which repeats ".join(f"{key} of {'/'.join(Path(shard).parts[-2:])}" for shard, _, key in places)
