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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from mmmoe_pretrain.data.sources.listing import is_remote
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data_prep.console import answer, say, say_json, stdout
from mmmoe_pretrain.data_prep.quality.filters import Filtered, rule_of
from mmmoe_pretrain.data_prep.rows.inputs import Input
from mmmoe_pretrain.data_prep.rows.refs import Ref, shown
from mmmoe_pretrain.data_prep.rows.row import SPLITS, Fault, Found, Row, split_called
from mmmoe_pretrain.data_prep.rows.seen import Seen
from mmmoe_pretrain.data_prep.rows.splits import split_of
from mmmoe_pretrain.data_prep.rows.spool import Spool, read_rows
from mmmoe_pretrain.data_prep.shards.building import Building, check_out
from mmmoe_pretrain.data_prep.shards.card import NAME as CARD
from mmmoe_pretrain.data_prep.shards.card import write_card
from mmmoe_pretrain.data_prep.shards.encode import BadSample, content_of
from mmmoe_pretrain.data_prep.shards.records import Summary, skipped, write_skipped
from mmmoe_pretrain.data_prep.shards.retry import OPTIONS, SKIPPED, Before, Settings, require
from mmmoe_pretrain.data_prep.shards.shard_files import write_shard_list
from mmmoe_pretrain.data_prep.shards.writing import Broken, ShardOptions, SplitWriter, TooManyBroken
from mmmoe_pretrain.limits import FIELD_ALIASES, has_text
from mmmoe_pretrain.progress import Progress, counted

log = logging.getLogger(__name__)
ROWS = "rows.tmp"
NOTHING = "no content"  # of a row without image, audio or text
CONSTANTS = ("language", "licence", "source", "attribution", "label", "subset", "audio_kind")  # fields of --set
SALT = "mmmoe-data shard"  # of splits by ratio


@dataclass(frozen=True, slots=True)
class Choice:
    """Which rows of an input are written, and where. ``filters``: field=value; ``ratios``: of the splits, for rows
    that name none; ``retry``: only the rows that have no sample yet in the shards of before; ``order``: None is the
    input's; ``columns``: those by which the input was opened; ``constants``: fields of rows that name none."""

    filters: Sequence[str] = ()
    ratios: Mapping[str, float] = field(default_factory=dict)
    retry: bool = False
    order: str | None = None
    columns: Sequence[str] = ()
    constants: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Report:
    """What was written, by split. ``skipped``: the first broken rows of this run."""

    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    sums: dict[str, Summary] = field(default_factory=dict)
    skipped: list[BadSample] = field(default_factory=list)
    kept: int = 0  # shards that an earlier run had finished
    tried: int = 0  # rows that failed before, and of these
    added: int = 0  # the samples now

    def filtered(self) -> str:
        """``filtered out 12 samples: 8 by --min-size, 4 by --language``; empty where there are none."""
        rules = sum((sums.rules for sums in self.sums.values()), Counter[str]())
        return f"filtered out {counted(rules.total(), 'sample')}: {by_rule(rules)}" if rules else ""

    def to_json(self) -> dict[str, Any]:
        sizes = {
            split: {"shards": len(entries), "bytes_of_shards": sum(entry["filesize"] for entry in entries)}
            for split, entries in self.shards.items()
        }
        return {
            "kept": self.kept,
            "splits": {split: {**sizes[split], **self.sums[split].to_json()} for split in sizes},
        }


def by_rule(rules: Counter[str]) -> str:
    """``8 by --min-size, 4 by --language``."""
    return ", ".join(f"{count:,} by {rule}" for rule, count in rules.most_common())


def settings_of(options: ShardOptions, choice: Choice) -> Settings:
    return Settings(
        options.media, options.filters, dict(choice.ratios), tuple(choice.columns), dict(choice.constants)
    )


def continued(
    out: Path, options: ShardOptions, choice: Choice, given: Collection[str]
) -> tuple[ShardOptions, Choice]:
    """With the options of the run that --retry continues; those that are ``given`` must not differ."""
    require(out)
    first = settings_of(options, choice).continued(out, given)
    options = dataclasses.replace(options, media=first.media, filters=first.filters)
    return options, dataclasses.replace(choice, ratios=first.ratios, columns=first.columns, constants=first.constants)


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


def constants_of(given: Sequence[str]) -> dict[str, str]:
    """``field=value`` of --set."""
    found: dict[str, str] = {}
    for item in given:
        name, _, value = item.partition("=")
        name = FIELD_ALIASES.get(name, name)
        if name not in CONSTANTS or not has_text(value) or name in found:
            raise ValueError(f"--set {item} is not field=value with one value of a field of {', '.join(CONSTANTS)}")
        found[name] = value
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
    if report.tried:
        say(f"tried {counted(report.tried, 'row')} again, of which {report.added:,} are samples now")
    if broken := sum(sums.broken for sums in report.sums.values()):
        say(f"skipped {counted(broken, 'broken sample')}, named in {out / SKIPPED}")
    if passing := sum(sums.passing for sums in report.sums.values()):
        say(f"{counted(passing, 'download')} of these may succeed another time: repeat the command with --retry")
    if filtered := report.filtered():
        say(f"{filtered}, named in {out / SKIPPED}")
    if blank := sum(int(sums.totals["blank_texts"]) for sums in report.sums.values()):
        say(f"skipped {counted(blank, 'blank text')} of samples with an image or audio")


def show_plan(plan: dict[str, Any], as_json: bool) -> None:
    """Print what ``--dry-run`` found."""
    lines = [
        f"{split}: {', '.join(f'{content or NOTHING} {count:,}' for content, count in its.items()) or 'none'}"
        for split, its in plan["splits"].items()
    ]
    if plan["filtered"]:
        lines.append(f"filtered out: {by_rule(Counter(plan['filtered']))}")
    if plan["missing"]:
        lines.append(
            f"{counted(plan['missing'], 'file')} that rows name do not exist: {', '.join(plan['first_missing'])}"
        )
    if plan["unchecked"]:
        lines.append(f"not looked at, since files are not opened: {', '.join(plan['unchecked'])}")
    answer(as_json, plan, f"{plan['input']}: {counted(plan['rows'], 'row')}; nothing was written", *lines)


def shard_rows(rows: Sequence[Row], root: Path, out: Path, options: ShardOptions) -> Report:
    """Write ``rows``, whose paths are relative to ``root``, as shards under ``out``."""
    found = (Found(f"row {number}", row) for number, row in enumerate(rows, 1))
    return write_shards(Input("these rows", root, found), out, options)


def write_shards(given: Input, out: Path, options: ShardOptions, choice: Choice | None = None) -> Report:
    """Write the rows of an input as shards under ``out``."""
    choice = choice or Choice()
    settings = settings_of(options, choice)
    if choice.retry:
        require(out)
    with (
        Building(out, options.overwrite or choice.retry) as building,
        Spool(building.folder / ROWS) as spool,
    ):
        before = Before(out, choice.retry)
        if choice.retry:
            settings.continued(out)
        seen = fill(spool, given, choice, before.failed)
        report, listed = Report(tried=len(spool) if choice.retry else 0), building.folder / SKIPPED
        broken = Broken(len(spool), 1.0 if choice.retry else options.max_bad_fraction, listed)

        def list_skipped() -> None:
            folders = [building.folder / split for split in report.sums]
            records = (skipped(building.folder / split, sums) for split, sums in report.sums.items())
            write_skipped(listed, before.skipped(itertools.chain.from_iterable(records), folders))

        try:
            with Progress("sharding", len(spool), "samples", waits_for=_waits_for(spool, options)) as progress:
                for split in (split for split in SPLITS if spool.counts[split] or split in before.shards):
                    report.sums[split] = Summary()
                    offsets = spool.offsets(split, choice.order or given.order)
                    work = SplitWriter(split, offsets, given.root, spool.path, options, broken, progress,
                                       len(before.shards.get(split, [])), before.records(split))  # fmt: skip
                    _write_split(work, building, report, before)
        except TooManyBroken:
            list_skipped()
            raise
        list_skipped()
        report.skipped = broken.named
        if not report.shards:
            filtered = report.filtered()
            what = f"no sample is left: {filtered}" if filtered else "every sample is broken"
            named = [what, broken.worst()] if broken.count else [what]
            raise ValueError(f"{': '.join(named)}; all are named in {listed}")
        broken.check()
        _write_cards(building, report, before.members, seen)
        if not choice.retry and seen.types() is not None:  # samples that are copied have no options
            settings.write(building.folder)
        building.commit(SKIPPED, CARD, *(() if choice.retry else (OPTIONS,)))
    return report


def _write_split(work: SplitWriter, building: Building, report: Report, before: Before) -> None:
    lines = work.write(building)
    report.kept += work.kept
    report.added += sum(line.entry.get("nsamples", 0) for line in lines)
    before.members.update(*(line.members for line in lines))
    if entries := [*before.shards.get(work.name, []), *(line.entry for line in lines if line.entry)]:
        report.shards[work.name] = entries
        write_shard_list(building.folder / work.name, entries)


def _waits_for(spool: Spool, options: ShardOptions) -> str:
    fetch = options.fetch
    limits = f"--timeout {fetch.timeout:g}, --retries {fetch.retries}"
    return f"downloads, of {counted(spool.downloads, 'row')} ({limits})" if spool.downloads else ""


def plan(given: Input, out: Path, choice: Choice, options: ShardOptions) -> dict[str, Any]:
    """What would be written, for ``--dry-run``: rows by split and content, those that filters of texts and language
    leave out, the ``missing`` files, and the fields beside them. No file of a row is opened: ``unchecked`` are the
    filters that need one."""
    check_out(out, options.overwrite or choice.retry)
    before, filters = Before(out, choice.retry), options.filters
    left_out, missing, lacking = Counter[str](), 0, list[str]()
    with tempfile.TemporaryDirectory() as folder, Spool(Path(folder) / ROWS) as spool:
        seen = fill(spool, given, choice, before.failed)
        content: dict[str, Counter[str]] = {split: Counter() for split in SPLITS if spool.counts[split]}
        for split, counts in content.items():
            for row, _ in read_rows(spool.path, spool.offsets(split, "input")):
                try:
                    filters.check_row(row)
                    counts[content_of(row)] += 1
                    absent = [shown(ref) for ref in row.files if _is_missing(ref, given.root)]
                    missing, lacking = missing + bool(absent), list(dict.fromkeys(lacking + absent))[:3]
                except Filtered as error:
                    left_out[rule_of(str(error))] += 1
        splits = {split: dict(counts.most_common()) for split, counts in content.items()}
        return {"input": given.name, "rows": len(spool), "splits": splits, "filtered": dict(left_out),
                "missing": missing, "first_missing": lacking, "unchecked": filters.of_files(),
                "fields": seen.types()}  # fmt: skip


def _is_missing(ref: Ref, root: Path) -> bool:
    return isinstance(ref, str) and not is_remote(ref) and not (root / ref).exists()


def fill(spool: Spool, given: Input, choice: Choice, only: set[str] | None) -> Seen:
    """Take the rows of an input, those whose keys are in ``only``. Raises ValueError with all their faults."""
    seen = Seen(given.root, choice.filters)
    for found in given.rows:
        if isinstance(found, Fault):
            spool.add(found)
            continue
        row = _with_constants(found.row, choice.constants)
        if seen.takes(row) and (only is None or row.key in only):
            spool.add(found._replace(row=row if row.split else _with_split(row, choice.ratios)))
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


def _with_constants(row: Row, constants: Mapping[str, str]) -> Row:
    missing = {name: value for name, value in constants.items() if not getattr(row, name)}
    return dataclasses.replace(row, **missing) if missing else row  # type: ignore[arg-type]


def _with_split(row: Row, ratios: Mapping[str, float]) -> Row:
    total = sum(ratios.values())
    if not total:
        return dataclasses.replace(row, split="train")
    shares = {name: ratios.get(name, 0.0) / total for name in ("test", "val")}
    return dataclasses.replace(row, split=split_of(row.group or row.key, SALT, **shares))


def _write_cards(building: Building, report: Report, members: set[str], seen: Seen) -> None:
    """The dataset cards. A split without a sample is not written."""
    for split in report.sums.keys() - report.shards.keys():
        shutil.rmtree(building.folder / split)
    for split in report.shards:
        write_card(building.folder / split, {split: "*.tar"}, members, seen.types(), {split: report.sums[split]})
    tars = {split: f"{split}/*.tar" for split in report.shards}
    write_card(building.folder, tars, members, seen.types(), report.sums)
