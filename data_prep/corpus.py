"""``mmmoe-data corpus``: fetch a corpus, write ``manifest.jsonl``, print its contents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep import corpora
from data_prep.manifest import SPLITS, Row, write_manifest


def run(name: str, out: Path, languages: Sequence[str] = ()) -> None:
    """The command."""
    rows, notes = corpora.build(name)(out, languages)
    path = out / "manifest.jsonl"
    write_manifest(path, rows)
    console = Console(markup=False)
    console.print(_table(f"{name}: {path}", rows))
    for what, count in notes.items():
        console.print(f"skipped: {count} {what}", highlight=False)


def _table(title: str, rows: Iterable[Row]) -> Table:
    """Rows and groups of each subset and its modalities, by split."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows:
        by_split = groups.setdefault((row.subset, "+".join(row.modalities)), {split: [] for split in SPLITS})
        by_split[row.split].append(row.group or row.key)
    table = Table("subset", "modalities", *SPLITS, title=f"{title}, rows (groups)", title_justify="left")
    for kind, by_split in sorted(groups.items()):
        table.add_row(*kind, *(f"{len(found):,} ({len(set(found)):,})" for found in by_split.values()))
    return table
