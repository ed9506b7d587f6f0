"""``mmmoe-data inspect``: what a manifest, a table, a folder or shards hold: tables, a page and a contact sheet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mmmoe_pretrain.data_prep import console
from mmmoe_pretrain.data_prep.console import printable, say
from mmmoe_pretrain.data_prep.inspect.measure import Found, Kind, amount, lines, measure
from mmmoe_pretrain.data_prep.inspect.page import write_page
from mmmoe_pretrain.data_prep.inspect.sheet import write_sheet
from mmmoe_pretrain.progress import counted


@dataclass(frozen=True, slots=True)
class Output:
    """What is written besides the table: files, with ``samples`` samples; ``max_bytes`` of the page."""

    html: Path | None = None
    sheet: Path | None = None
    samples: int = 60
    seed: int = 0
    max_bytes: int = 20_000_000
    as_json: bool = False


def run(path: str, output: Output) -> None:
    """The command."""
    for option, file, suffix in (("--html", output.html, ".html"), ("--sheet", output.sheet, ".png")):
        if file is not None and (file.suffix.lower() != suffix or file.is_dir()):
            raise ValueError(f"{option} {file} is not a file whose name ends with {suffix}; choose such a name")
    found = measure(path, output.samples if output.html or output.sheet else 0, output.seed)
    written: dict[str, Any] = {}
    if output.sheet is not None:
        write_sheet(output.sheet, found.chosen)
        written["sheet"] = {"file": str(output.sheet), "samples": len(found.chosen)}
    if output.html is not None:
        shown = write_page(output.html, found, output.seed, output.max_bytes)
        written["html"] = {"file": str(output.html), "samples": shown, "left_out": len(found.chosen) - shown}
    if output.as_json:
        console.say_json({**found.to_json(), **written})
        return
    _print(found)
    for each in written.values():
        more = f", {each['left_out']} did not fit (--max-mb)" if each.get("left_out") else ""
        say(f"wrote {each['file']}: {counted(each['samples'], 'sample')}{more}")


def _print(found: Found) -> None:
    table = Table(*Kind._fields, "rows", "hours", "bytes", title=printable(found.name), title_justify="left")
    for split, kinds in found.by_split():
        for kind in kinds:
            table.add_row(*map(printable, kind), *found.totals[kind].cells())
        table.add_row(printable(split), "", "", "all", *found.sum_of(kinds).cells(), style="bold", end_section=True)
    out = console.stdout()
    out.print(table)
    table = Table("", "values", "least", "mean", "most", "by powers of two")
    for name, each in found.histograms.items():
        if each.count:
            table.add_row(name, f"{each.count:,}", *map(amount, (each.least, each.mean, each.most)), each.bars())
    out.print(table)
    for line in lines(found):
        say(line)
