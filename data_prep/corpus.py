"""``mmmoe-data corpus``: fetch a corpus, write ``manifest.jsonl``, print its contents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_prep import corpora
from data_prep.manifest import write_manifest
from data_prep.tables import count_rows, print_counts


def run(name: str, out: Path, languages: Sequence[str] = ()) -> None:
    rows, notes = corpora.build(name)(out, languages)
    path = out / "manifest.jsonl"
    write_manifest(path, rows)
    console = Console()
    print_counts(console, f"{name}: {path}", count_rows(rows))
    for what, count in notes.items():
        console.print(f"skipped: {count} {what}", highlight=False)
