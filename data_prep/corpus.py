"""``mmmoe-data corpus``: fetch a corpus, write ``manifest.jsonl``, print its contents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.table import Table

from mmmoe_pretrain.data_prep import console, corpora
from mmmoe_pretrain.data_prep.console import say
from mmmoe_pretrain.data_prep.rows.manifest import write_manifest
from mmmoe_pretrain.data_prep.rows.row import SPLITS, Row


def run(name: str, out: Path, languages: Sequence[str] = (), dry_run: bool = False, as_json: bool = False) -> None:
    """The command."""
    build, path = corpora.build(name), out / "manifest.jsonl"
    answer = {"corpus": name, "content": corpora.CORPORA[name], "manifest": str(path)}
    if dry_run:
        console.answer(as_json, answer, f"would fetch {answer['content']}, and write {path}")
        return
    rows, notes = build(out, languages)
    write_manifest(path, rows)
    if as_json:
        console.say_json({**answer, "rows": Counter(row.split for row in rows), "skipped": notes})
        return
    console.stdout().print(_table(f"{name}: {path}", rows))
    for what, count in notes.items():
        say(f"skipped: {count} {what}")


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
