"""A report as a value: JSON for programs, Markdown for people, a table for the console.

Owns the format. ``report.json`` is ``{"run", "step", "date", "test", "results": [{"metric", "value",
"interval", "chance", "majority", "n", "candidates", "unit"}], "routing", "notes"}``. The report of another run on the
same held-out shards adds ``"beside": {RUN: value}`` to each row, and a column RUN to the tables.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmmoe_pretrain.evaluate.routing_report import experts_used
from mmmoe_pretrain.evaluate.scores import Score
from mmmoe_pretrain.paths import new_file
from mmmoe_pretrain.untrusted import brief, read_json

JSON, PAGE = "report.json", "report.md"
LEGEND = (
    "Chance answers at random. Majority gives every query the best fixed answer (perplexity: token "
    "frequencies of the training targets). In brackets: 95% interval. n: queries, items or tokens."
)
WIDE = 1000  # columns of a pipe or a file, in which no table is too wide


@dataclass(frozen=True)
class Report:
    """The results of an evaluation."""

    run: str
    step: int
    date: str
    test: list[str]  # folders of held-out shards
    results: list[dict[str, Any]]
    routing: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def value(self, metric: str) -> float:
        """The value of one metric; KeyError if it is missing."""
        return {row["metric"]: row["value"] for row in self.results}[metric]


FIELDS = {"run": str, "step": int, "date": str, "test": list, "results": list, "routing": dict, "notes": list}


def read(path: Path) -> Report:
    """The report in the file ``path``, or in the folder of a run. Raises ValueError where it is missing or damaged.
    Of its rows, metric, value and n are checked."""
    path = path if path.is_file() or path.name == JSON else path / JSON
    remedy = f"write it with mmmoe evaluate {path.parent}"
    if not path.exists():
        raise ValueError(f"{path} does not exist; {remedy}")
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    if problem := _problem(found):
        raise ValueError(f"{path} is not a report of mmmoe evaluate ({problem}); {remedy}")
    return Report(**{name: found[name] for name in FIELDS})


def _problem(found: dict[str, Any]) -> str:
    """Why it is no report; empty where it is one."""
    for name, kind in FIELDS.items():
        if not isinstance(found.get(name), kind):
            return f"{name} is {brief(found.get(name))}"
    if not all(isinstance(folder, str) for folder in found["test"]):
        return f"test is {brief(found['test'])}"
    wrong = [row for row in found["results"] if not _is_row(row)]
    return f"a row of its results is {brief(wrong[0])}" if wrong else ""


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("metric"), str) or type(row.get("n")) is not int:
        return False
    return type(row.get("value")) in (int, float) and abs(row["value"]) <= sys.float_info.max  # NaN is not


def rows_of(scores: Sequence[Score], other: Report | None = None) -> list[dict[str, Any]]:
    """Scores, each with its value in ``other``; None where that has no such score, or one of another number of
    queries, items or tokens."""
    rows = [asdict(s) | {"interval": list(s.interval)} for s in scores]
    if other is None:
        return rows
    values = {(row["metric"], row["n"]): row["value"] for row in other.results}
    return [row | {"beside": {other.run: values.get((row["metric"], row["n"]))}} for row in rows]


def write(report: Report, directory: Path) -> None:
    """``report.json`` and ``report.md``, replacing those of an earlier evaluation."""
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False, allow_nan=False)
    for name, content in ((JSON, text + "\n"), (PAGE, markdown(report))):
        with new_file(directory / name) as draft:
            draft.write_text(content, encoding="utf-8")


def markdown(report: Report) -> str:
    """The report as a page of tables."""
    lines = [f"# {report.run}, step {report.step}", "", f"Evaluated {report.date} on held-out rows.", ""]
    columns = _columns(report.results)
    lines += table([name for name, _ in columns], [[cell(row) for _, cell in columns] for row in report.results])
    lines += ["", LEGEND]
    if report.notes:
        lines += ["", "## Notes", ""] + [f"- {note}" for note in report.notes]
    if report.routing["layers"]:
        layers = report.routing["layers"]
        lines += ["", *modality_section(layers, report.routing["figure"]), "", *layer_lines(layers)]
        lines += task_section(layers)
    return "\n".join(lines) + "\n"


def print_table(report: Report) -> None:
    """The results on the console; what a score is made of ("speech_to_text_r10/fr") is in report.md."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)
    if not console.is_terminal:
        console.width = WIDE  # else a pipe or a file gets 80 columns, and the table is cut
    table = Table(title=f"{report.run}, step {report.step}: held-out rows", title_justify="left", box=SIMPLE_HEAD)
    hidden = {"candidates"} if console.width >= 100 else {"candidates", "95%"}  # report.md has them all
    (metric, _), *columns = [column for column in _columns(report.results) if column[0] not in hidden]
    table.add_column(metric, overflow="fold")  # on a narrow terminal
    for name, _ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.results:
        if "/" not in row["metric"]:
            table.add_row(row["metric"], *[cell(row) for _, cell in columns])
    console.print(table)
    for line in layer_lines(report.routing["layers"]):
        console.print(line.removeprefix("- "), highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", style="dim", highlight=False)


def specialisation_line(layer: dict[str, Any]) -> str:
    """One layer's specialisation, where there is more than one modality, and its dead experts in words."""
    dead = len(layer["dead"])
    specialisation = (
        f"specialisation {layer['specialisation']:.0%} "
        f"({layer['specialisation_bits']:.2f} of {layer['modality_bits']:.2f} bits; "
        f"untrained {layer['specialisation_untrained']:.0%}), "
    )
    dead_experts = f"{dead if dead else 'no'} dead expert{'' if dead == 1 else 's'} of {layer['experts']}"
    return specialisation + dead_experts if layer["modality_bits"] else dead_experts


def layer_lines(layers: Sequence[dict[str, Any]]) -> list[str]:
    return [f"- layer {layer['layer']}: {specialisation_line(layer)}" for layer in layers]


Row = dict[str, Any]


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """The title of each, and what a row shows there; the one of another run where there is one."""

    def beside(run: str) -> Callable[[Row], str]:
        return lambda row: _number(row["beside"][run], row["unit"])

    return [
        ("metric", lambda row: row["metric"]),
        ("value", lambda row: _number(row["value"], row["unit"])),
        ("95%", lambda row: f"[{', '.join(_number(bound, row['unit']) for bound in row['interval'])}]"),
        ("chance", lambda row: _number(row["chance"], row["unit"])),
        ("majority", lambda row: _number(row["majority"], row["unit"])),
        *((run, beside(run)) for run in (rows[0].get("beside", {}) if rows else {})),
        ("n", lambda row: f"{row['n']:,}"),
        ("candidates", lambda row: "-" if row["candidates"] is None else f"{row['candidates']:,}"),
    ]


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "share":
        return f"{100 * value:.1f}%"
    if unit in ("cosine", "distance"):
        return f"{value:.3f}"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def modality_section(layers: Sequence[dict[str, Any]], figure: str | None) -> list[str]:
    """How each layer's experts serve each modality: a figure, a table and its legend."""
    columns = ["layer", "modality", "tokens", "experts used", "entropy (bits)", "dropped", "most used experts"]
    rows = [
        [
            str(layer["layer"]),
            name,
            f"{layer['tokens'][name]:,.0f}",
            f"{layer['experts_used'][name]:.1f} of {layer['experts']}",
            f"{layer['entropy_bits'][name]:.2f}",
            f"{layer['dropped'][name]:.1%}",
            ", ".join(f"{e}: {share[e]:.0%}" for e in sorted(range(len(share)), key=lambda e: -share[e])[:4]),
            ", ".join(map(str, layer["dead"])) or "none",
        ]
        for layer in layers
        for name, share in layer["share"].items()
    ]
    legend = (
        "Specialisation is the mutual information of modality and expert, with equal weights of all modalities: 0% "
        "if all modalities use the experts equally, 100% if the expert determines the modality. Untrained is the "
        "same model before its first step, on the same rows: not 0%, since the modalities have different embeddings. "
        "Experts used is the exponential of the entropy of a modality's shares; entropy that of the router's "
        "distribution for a token; dropped is the share of assignments for which the expert was over capacity; an "
        "expert is dead below 1% of an even share in every modality."
    )
    title = "Which experts serve which modality"
    shown = [f"![{title}]({figure})", ""] if figure else []
    return [f"## {title}", "", *shown, *table([*columns, "dead experts"], rows), "", legend]


def task_section(layers: Sequence[dict[str, Any]]) -> list[str]:
    """How each layer's experts serve each task; nothing of a run with one."""
    rows = []
    for layer in layers:
        tasks = layer.get("share_by_task", {})
        for task, share in tasks.items() if len(tasks) > 1 else ():
            first = sorted(range(len(share)), key=lambda e: -share[e])[:4]
            used = float(experts_used(np.asarray(share)))
            most = ", ".join(f"{e}: {share[e]:.0%}" for e in first)
            rows.append([str(layer["layer"]), task, f"{used:.1f} of {layer['experts']}", most])
    if not rows:
        return []
    determined = [
        f"- layer {layer['layer']}: {', '.join(f'{name} {value:.0%}' for name, value in found.items())}"
        for layer in layers
        if (found := layer.get("task_specialisation", {}))
    ]
    legend = (
        "Of the tokens of each task's segments; what several tasks read is packed once, for the first of them. "
        "Below, how much of the task the expert of a token determines, by modality: 0% if its tasks use the experts "
        "equally, 100% if the expert determines the task."
    )
    columns = ["layer", "task", "experts used", "most used experts"]
    return ["", "## Which experts serve which task", "", *table(columns, rows), "", legend, "", *determined]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    header = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return header + ["| " + " | ".join(row) + " |" for row in rows]
