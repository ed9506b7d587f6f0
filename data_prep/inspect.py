"""``mmmoe-data inspect``: the contents of a manifest or of shards, as a table.

Counts rows, hours of audio and bytes by split, subset, language and modalities, and the files that are not read.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from data_prep.manifest import SPLITS, manifest_path, read_manifest, split_called
from data_prep.media import audio_seconds
from data_prep.verify import split_specs
from mmmoe_pretrain.data.decode import PARTS, BadSampleError, read_row
from mmmoe_pretrain.data.sources.listing import is_compressed, without_ranges
from mmmoe_pretrain.data.sources.members import RawSample
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data.sources.survey import held_by, in_order, survey
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.limits import MAX_MEMBER_BYTES
from mmmoe_pretrain.modalities import Modalities, format_of
from mmmoe_pretrain.progress import track
from mmmoe_pretrain.untrusted import read_bytes
from mmmoe_pretrain.urls import redacted

log = logging.getLogger(__name__)
NO_SPLIT = "(none)"  # neither the folder nor the sample names one
DAMAGED = "(damaged)"  # in the place of modalities: a sample that training skips


class Kind(NamedTuple):
    """The key of a line of the table."""

    split: str
    subset: str
    language: str
    modalities: str


@dataclass(slots=True)
class Measure:
    """Sums over the rows of a kind."""

    rows: int = 0
    seconds: float = 0.0  # of audio
    bytes: int = 0

    def __iadd__(self, other: Measure) -> Measure:
        self.rows += other.rows
        self.seconds += other.seconds
        self.bytes += other.bytes
        return self

    def cells(self) -> tuple[str, str, str]:
        """Of the table: rows, hours of audio, bytes."""
        return f"{self.rows:,}", f"{self.seconds / 3600:.3f}" if self.seconds else "", f"{self.bytes:,}"


def run(path: str) -> None:
    """The command: measure, and print a line a kind and a line a split."""
    totals, left_out = measure(path)
    table = Table(*Kind._fields, "rows", "hours", "bytes", title=redacted(path), title_justify="left")
    for split in sorted({kind.split for kind in totals}, key=lambda split: (split not in SPLITS, split)):
        whole = Measure()
        for kind in sorted(kind for kind in totals if kind.split == split):
            table.add_row(*kind, *totals[kind].cells())
            whole += totals[kind]
        table.add_row(split, "", "", "all", *whole.cells(), style="bold", end_section=True)
    console = Console(markup=False)
    console.width = max(console.width, 110)  # whole names in a log, too
    console.print(table)
    if left_out:
        console.print(f"not read: {left_out}", highlight=False, soft_wrap=True)


def measure(path: str | Path) -> tuple[dict[Kind, Measure], str]:
    """The sums by kind, of a manifest or of shards; and the extensions that are not read, with their numbers."""
    place = Path(path)
    is_manifest = place.is_file() and place.suffix not in (".tar", ".json") and not is_compressed(place.name)
    if is_manifest or (place / "manifest.jsonl").is_file():
        return _totals(_of_manifest(place)), ""
    files = Files()
    sources = [open_indexed(spec, files) for spec in split_specs(str(path))]
    for note in without_ranges((url for source in sources for url in source.urls), files):
        log.warning("%s", note)
    return _totals(_of_shards(sources)), survey(sources).left_out()


def _totals(lines: Iterable[tuple[Kind, Measure]]) -> dict[Kind, Measure]:
    totals: dict[Kind, Measure] = defaultdict(Measure)
    for kind, amount in lines:
        totals[kind] += amount
    return totals


def _of_manifest(path: Path) -> Iterator[tuple[Kind, Measure]]:
    root = manifest_path(path).parent
    rows = read_manifest(path)
    for row in track(rows, "reading the files", len(rows), "rows"):
        seconds, size = 0.0, sum(len(text.encode()) for text in row.texts)
        for file in filter(Path.is_file, (root / name for name in row.files)):
            size += file.stat().st_size
            seconds += _seconds(read_bytes(file, MAX_MEMBER_BYTES)) if _is_clip(file.name) else 0.0
        content = _content(row.modalities, row.parts is not None)
        yield Kind(row.split, row.subset, row.language, content), Measure(1, seconds, size)


def _of_shards(sources: Iterable[Indexed]) -> Iterator[tuple[Kind, Measure]]:
    for shards in sources:
        name = Path(shards.spec).name
        split = split_called(name) if split_called(name) in SPLITS else NO_SPLIT
        for i in track(range(len(shards)), f"reading {name}", len(shards), "samples"):
            yield _of_sample(shards.read(i), shards.modalities, split)


def _of_sample(raw: RawSample, modalities: Modalities, split: str) -> tuple[Kind, Measure]:
    size = sum(len(data) for data in raw.members.values())
    try:
        row = read_row(raw)
        held, named = held_by(raw, row, modalities, any_kind=True)
    except BadSampleError:
        return Kind(split, "", "", DAMAGED), Measure(1, 0.0, size)
    fields = {name: value for name, value in row.items() if isinstance(value, str)}
    read = named or modalities.members_read((*raw.members, *raw.unread)).values()
    seconds = sum(_seconds(raw.members[name]) for name in read if name in raw.members and _is_clip(name))
    split = split_called(fields.get("split") or split)
    content = _content(in_order(held, modalities), PARTS in row)
    return Kind(split, fields.get("subset", ""), fields.get("language", ""), content), Measure(1, seconds, size)


def _content(held: Iterable[str], is_document: bool) -> str:
    return f"{'document of ' * is_document}{'+'.join(held)}"


def _is_clip(name: str) -> bool:
    return format_of(name.lower()) == "audio"


def _seconds(data: bytes) -> float:
    """Length of a clip; a broken one counts for nothing here, ``shard`` and training report it."""
    try:
        return audio_seconds(data)
    except ValueError:
        return 0.0
