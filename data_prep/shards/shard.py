"""``mmmoe-data shard``: rows become shards, one folder a split, with what is told of them.

Rows are ordered by a hash of their keys, so every shard is a mix. Memory does not grow with the rows, which lie on
disk (``rows/spool.py``); ``writing.py`` writes them.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from data_prep.console import answer, say, say_json, stdout
from data_prep.rows.inputs import Input
from data_prep.rows.row import SPLITS, Fault, Found, Row, split_called
from data_prep.rows.seen import Seen
from data_prep.rows.splits import split_of
from data_prep.rows.spool import Spool, read_rows
from data_prep.shards.building import Building
from data_prep.shards.card import NAME as CARD
from data_prep.shards.card import write_card
from data_prep.shards.encode import BadSample, content_of
from data_prep.shards.records import (
    BROKEN,
    OK,
    Summary,
    read_records,
    read_skipped,
    skipped,
    summarize,
    write_skipped,
)
from data_prep.shards.shard_files import write_shard_list
from data_prep.shards.writing import Broken, ShardOptions, SplitWriter, worst
from mmmoe_pretrain.data.sources.listing import LIST, read_list
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.progress import Progress, counted

log = logging.getLogger(__name__)
SKIPPED = "skipped.jsonl"
ROWS = "rows.tmp"
SALT = "mmmoe-data shard"  # of splits by ratio


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rows of an input are written, and where. ``filters``: field=value; ``ratios``: of the splits, for rows
    that name none; ``retry``: only the rows that have no sample yet in the shards of before; ``order``: None is the
    input's."""

    filters: Sequence[str] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    retry: bool = False
    order: str | None = None


@dataclass(slots=True)
class Report:
    """What was written, by split. ``skipped``: the first broken rows of this run."""

    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sums: dict[str, Summary] = field(default_factory=dict)
    skipped: list[BadSample] = field(default_factory=list)
    kept: int = 0  # shards that an earlier run had finished

    def filtered(self) -> str:
        """``filtered out 12 samples (--min-size 8, --language 4)``; empty where there are none."""
        rules = sum((sums.rules for sums in self.sums.values()), Counter[str]())
        each = ", ".join(f"{rule} {count:,}" for rule, count in rules.most_common())
        return f"filtered out {counted(rules.total(), 'sample')} ({each})" if rules else ""

    def to_json(self) -> dict[str, Any]:
        sizes = {
            split: {"shards": len(entries), "bytes_of_shards": sum(entry["filesize"] for entry in entries)}
            for split, entries in self.shards.items()
        }
        return {
            "kept": self.kept,
            "splits": {split: {**sizes[split], **self.sums[split].to_json()} for split in sizes},
        }


def ratios_of(given: Sequence[str]) -> dict[str, float]:
    """``split=share`` as numbers."""
    found: dict[str, float] = {}
    for item in given:
        name, _, share = item.partition("=")
        try:
            found[split_called(name)] = float(share)
        except ValueError:
            share = "-1"
        if split_called(name) not in SPLITS or not 0 <= float(share) < math.inf:
            raise ValueError(
                f"--ratio {item} is not split=share with a split of {', '.join(SPLITS)} and a share from 0 on"
            )
    if found and not sum(found.values()):
        raise ValueError("--ratio: every share is 0")
    return found


def order_of(given: str | None) -> str | None:
    if given not in (None, "shuffled", "input"):
        raise ValueError(f"--order {given} is not shuffled or input")
    return given


def run(given: Input, out: Path, choice: Choice, options: ShardOptions) -> Report:
    """Write and index the rows of an input."""
    report = write_shards(given, out, options, choice)
    for split in report.shards:
        open_indexed(out / split)
    return report


def show(report: Report, out: Path, as_json: bool) -> None:
    """Print a summary."""
    if as_json:
        say_json(report.to_json())
        return
    table = Table("split", "shards", "samples", "bytes")
    for split, entries in report.shards.items():
        samples, size = (sum(entry[name] for entry in entries) for name in ("nsamples", "filesize"))
        table.add_row(split, f"{len(entries):,}", f"{samples:,}", f"{size:,}")
    stdout().print(table)
    if report.kept:
        say(f"kept {counted(report.kept, 'shard')} that an earlier run had finished")
    if broken := sum(sums.broken for sums in report.sums.values()):
        say(f"skipped {counted(broken, 'broken sample')}, named in {out / SKIPPED}")
    if filtered := report.filtered():
        say(f"{filtered}, named in {out / SKIPPED}")
    if blank := sum(int(sums.totals["blank_texts"]) for sums in report.sums.values()):
        say(f"skipped {counted(blank, 'blank text')} of samples with an image or audio")


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    """Print what ``--dry-run`` found."""
    lines = [
        f"{split}: {', '.join(f'{content} {count:,}' for content, count in its.items())}"
        for split, its in plan["splits"].items()
    ]
    answer(as_json, plan, f"{plan['input']}: {counted(plan['rows'], 'row')}; nothing was written", *lines)


def shard_rows(rows: Sequence[Row], root: Path, out: Path, options: ShardOptions) -> Report:
    """Write ``rows``, whose paths are relative to ``root``, as shards under ``out``."""
    found = (Found(f"row {number}", row) for number, row in enumerate(rows, 1))
    return write_shards(Input("these rows", root, found), out, options)


def write_shards(given: Input, out: Path, options: ShardOptions, choice: Choice | None = None) -> Report:
    """Write the rows of an input as shards under ``out``."""
    choice = choice or Choice()
    if choice.retry and not out.is_dir():
        raise ValueError(f"there is no folder {out} with rows to try again; leave out --retry")
    with (
        Building(out, options.overwrite or choice.retry) as building,
        Spool(building.folder / ROWS) as spool,
    ):
        before = _Before(out, choice.retry)
        seen = fill(spool, given, choice, before.failed)
        report = Report()
        broken = Broken(len(spool), 1.0 if choice.retry else options.max_bad_fraction)
        with Progress("sharding", len(spool), "samples") as progress:
            for split in (split for split in SPLITS if spool.counts[split] or split in before.shards):
                offsets = spool.offsets(split, choice.order or given.order)
                first = before.shards.get(split, [])
                work = SplitWriter(split, offsets, given.root, spool.path, options, broken, progress, len(first))
                lines = work.write(building)
                report.kept += work.kept
                before.members.update(*(line.members for line in lines))
                report.sums[split] = summarize(building.folder / split)
                if entries := [*first, *(line.entry for line in lines if line.entry)]:
                    report.shards[split] = entries
                    write_shard_list(building.folder / split, entries)
        report.skipped = broken.named
        if not report.shards:
            filtered = report.filtered()
            what = f"no sample is left: {filtered}" if filtered else "every sample is broken"
            raise ValueError(f"{what}: {worst(broken.named, broken.count)}" if broken.count else what)
        broken.check()
        _write_lists(building, report, before, seen)
        building.commit(SKIPPED, CARD)
    return report


class _Before:
    """What an earlier command has written, if --retry continues it: its ``shards`` by split, the suffixes of their
    ``members``, and the keys of the rows that ``failed``; None: all rows are written."""

    def __init__(self, out: Path, retry: bool) -> None:
        self.shards: dict[str, list[dict[str, Any]]] = {}
        self.members: set[str] = set()
        self.failed: set[str] | None = None
        self._skipped = out / SKIPPED
        if not retry:
            return
        lists = {split: out / split / LIST for split in SPLITS if (out / split / LIST).exists()}
        if not lists or not (out / SKIPPED).exists():
            raise ValueError(f"{out} holds no shards of mmmoe-data shard with rows to try again; leave out --retry")
        self.shards = {split: read_list(str(path), Files()) for split, path in lists.items()}
        for split in self.shards:
            self.members.update(*open_indexed(out / split).contents)
        self.failed = {line["key"] for line in read_skipped(self._skipped) if line["status"] == BROKEN}

    def skipped(self, folders: Sequence[Path]) -> Iterator[dict[str, Any]]:
        """The rows without a sample now, as the records in the folders of the splits tell. With --retry, without
        those that have a sample now in another split, and with those of before that were not tried again."""
        records = itertools.chain.from_iterable(map(skipped, folders))
        if self.failed is None:
            yield from records
            return
        told: set[str] = set()
        for folder in folders:
            for batch in read_records(folder, ("key", "status")):
                each = zip(batch["key"], batch["status"], strict=True)
                told.update(key for key, status in each if status == OK and key in self.failed)
        for record in itertools.chain(records, read_skipped(self._skipped)):
            if record["key"] not in told:
                told.add(record["key"])
                yield record


def plan(given: Input, choice: Choice) -> dict[str, Any]:
    """What would be written, for ``--dry-run``: rows by split and content, and the fields beside them."""
    with tempfile.TemporaryDirectory() as folder, Spool(Path(folder) / ROWS) as spool:
        seen = fill(spool, given, choice, None)
        content = {
            split: dict(Counter(map(content_of, read_rows(spool.path, spool.offsets(split, "input")))).most_common())
            for split in SPLITS
            if spool.counts[split]
        }
        return {"input": given.name, "rows": len(spool), "splits": content, "fields": seen.types()}


def fill(spool: Spool, given: Input, choice: Choice, only: set[str] | None) -> Seen:
    """Take the rows of an input, those whose keys are in ``only``. Raises ValueError with all their faults."""
    seen = Seen(given.root, choice.filters)
    for found in given.rows:
        if isinstance(found, Fault):
            spool.add(found)
        elif seen.takes(found.row) and (only is None or found.row.key in only):
            spool.add(found if found.row.split else found._replace(row=_with_split(found.row, choice.ratios)))
    spool.close(given.equal_keys)
    spool.faults.refuse(given.name)
    seen.check()
    for note in (*given.notes, *seen.notes()):
        log.warning("%s", note)
    if not len(spool):
        if only is not None:
            raise ValueError(f"no row of {given.name} is left to be tried again")
        raise ValueError("no rows to write; loosen --filter" if choice.filters else f"{given.name} has no rows")
    return seen


def _with_split(row: Row, ratios: Mapping[str, float]) -> Row:
    total = sum(ratios.values())
    if not total:
        return dataclasses.replace(row, split="train")
    shares = {name: ratios.get(name, 0.0) / total for name in ("test", "val")}
    return dataclasses.replace(row, split=split_of(row.group or row.key, SALT, **shares))


def _write_lists(building: Building, report: Report, before: _Before, seen: Seen) -> None:
    """What lies beside the shards: the skipped rows, and dataset cards. A split without a sample is not written."""
    members = before.members
    write_skipped(building.folder / SKIPPED, before.skipped([building.folder / split for split in report.sums]))
    for split in report.sums.keys() - report.shards.keys():
        shutil.rmtree(building.folder / split)
    for split in report.shards:
        write_card(building.folder / split, {split: "*.tar"}, members, seen.types(), {split: report.sums[split]})
    tars = {split: f"{split}/*.tar" for split in report.shards}
    write_card(building.folder, tars, members, seen.types(), report.sums)
