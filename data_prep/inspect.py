"""``mmmoe-data inspect``: what a manifest or a folder of shards holds, as a table.

Counts rows, hours of sound and bytes by split, subset, language and modalities.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from data_prep.manifest import SPLITS, manifest_path, read_manifest
from data_prep.media import AUDIO_SUFFIXES, IMAGE_SUFFIXES, audio_seconds
from data_prep.progress import track
from data_prep.verify import split_folders
from mmmoe_pretrain.data.shards import ShardFolder
from mmmoe_pretrain.limits import MAX_MEMBER_BYTES, MAX_META_BYTES
from mmmoe_pretrain.untrusted import parse_json, read_bytes


class Kind(NamedTuple):
    """What the table has a line for."""

    split: str
    subset: str
    language: str
    modalities: str


class Measure(NamedTuple):
    """Sums over the rows of a kind."""

    rows: int = 0
    seconds: float = 0.0  # of sound
    bytes: int = 0

    def plus(self, other: Measure) -> Measure:
        return Measure(self.rows + other.rows, self.seconds + other.seconds, self.bytes + other.bytes)


def run(path: Path) -> None:
    """The command: measure, and print a line a kind and a line a split."""
    totals = measure(path)
    table = Table(*Kind._fields, "rows", "hours", "bytes", title=str(path), title_justify="left")
    for split in SPLITS:
        lines = {kind: total for kind, total in totals.items() if kind.split == split}
        for kind, total in sorted(lines.items()):
            table.add_row(*kind, *_cells(total))
        if lines:
            table.add_row(split, "", "", "all", *_cells(_sum(lines.values())), style="bold", end_section=True)
    console = Console()
    console.width = max(console.width, 110)  # whole names in a log, too
    console.print(table)


def measure(path: Path) -> dict[Kind, Measure]:
    """The sums by kind, of a manifest or of shards."""
    is_manifest = path.is_file() or (path / "manifest.jsonl").is_file()
    totals: dict[Kind, Measure] = {}
    for kind, amount in _of_manifest(path) if is_manifest else _of_shards(path):
        totals[kind] = totals.get(kind, Measure()).plus(amount)
    return totals


def _of_manifest(path: Path) -> Iterator[tuple[Kind, Measure]]:
    root = manifest_path(path).parent
    rows = read_manifest(path)
    for row in track(rows, "reading the files", len(rows), "rows"):
        seconds, size = 0.0, len((row.text or "").encode())
        if row.image and (root / row.image).is_file():
            size += (root / row.image).stat().st_size
        if row.audio and (root / row.audio).is_file():
            data = read_bytes(root / row.audio, MAX_MEMBER_BYTES)
            seconds, size = _seconds(data), size + len(data)
        yield Kind(row.split, row.subset, row.language, "+".join(row.modalities)), Measure(1, seconds, size)


def _of_shards(path: Path) -> Iterator[tuple[Kind, Measure]]:
    for folder in split_folders(path):
        shards = ShardFolder(folder)
        for i in track(range(len(shards)), f"reading {folder.name}", len(shards), "samples"):
            sample = shards.read(i)
            yield _of_sample(sample.members, folder.name, f"sample {sample.key} in {folder}")


def _of_sample(members: dict[str, bytes], folder: str, where: str) -> tuple[Kind, Measure]:
    row = parse_json(members.get("json", b"{}"), f"the json of {where}", MAX_META_BYTES)
    fields = {k: v for k, v in row.items() if isinstance(v, str)} if isinstance(row, dict) else {}
    present = [
        name
        for name, suffixes in (("image", IMAGE_SUFFIXES), ("audio", AUDIO_SUFFIXES))
        if members.keys() & set(suffixes.values())
    ] + (["text"] if "txt" in members else [])
    seconds = sum(_seconds(data) for suffix, data in members.items() if suffix in AUDIO_SUFFIXES.values())
    split = fields.get("split") or (folder if folder in SPLITS else "train")
    kind = Kind(split, fields.get("subset", ""), fields.get("language", ""), "+".join(present))
    return kind, Measure(1, seconds, sum(len(data) for data in members.values()))


def _seconds(data: bytes) -> float:
    """Length of a sound; a broken one counts for nothing here, ``shard`` and training report it."""
    try:
        return audio_seconds(data)
    except ValueError:
        return 0.0


def _sum(measures: Iterable[Measure]) -> Measure:
    total = Measure()
    for amount in measures:
        total = total.plus(amount)
    return total


def _cells(total: Measure) -> tuple[str, str, str]:
    return f"{total.rows:,}", f"{total.seconds / 3600:.3f}" if total.seconds else "", f"{total.bytes:,}"
