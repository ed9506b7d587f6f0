"""Tables of counts, as the commands print them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from data_prep.manifest import SPLITS, Row


@dataclass(slots=True)
class Count:
    """Rows of one kind, and the groups they fall into."""

    rows: int = 0
    groups: int = 0


def count_rows(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Count]]:
    """(subset, modalities) -> split -> rows and groups."""
    groups: dict[tuple[str, str, str], set[str]] = {}
    counts: dict[tuple[str, str], dict[str, Count]] = {}
    for row in rows:
        modalities = "+".join(row.modalities)
        by_split = counts.setdefault((row.subset, modalities), {split: Count() for split in SPLITS})
        members = groups.setdefault((row.subset, modalities, row.split), set())
        members.add(row.group or row.key)
        by_split[row.split].rows += 1
        by_split[row.split].groups = len(members)
    return dict(sorted(counts.items()))


def print_counts(console: Console, title: str, counts: Mapping[tuple[str, str], Mapping[str, Count]]) -> None:
    table = Table(
        "subset",
        "modalities",
        *SPLITS,
        title=title,
        title_justify="left",
        caption="rows (groups)",
        caption_justify="left",
    )
    for (subset, modalities), by_split in counts.items():
        table.add_row(
            subset,
            modalities,
            *(f"{by_split[split].rows:,} ({by_split[split].groups:,})" for split in SPLITS),
        )
    console.print(table)
