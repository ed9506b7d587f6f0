"""A report as a value: JSON for programs, Markdown for people, a table for the console.

Owns the format. ``report.json`` is ``{"run", "step", "date", "results": [{"metric", "value",
"interval", "chance", "majority", "dense", "n", "candidates", "unit"}], "routing", "notes"}``.
The dense column comes from the file that ``make compare`` records: ``{"dense": {"test": [...],
"results": [...]}}``, and stands only beside scores of the same held-out shards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmmoe_pretrain.evaluate.scores import Score
from mmmoe_pretrain.untrusted import brief, read_json

NOT_RECORDED = "not recorded"
LEGEND = (
    "Chance answers at random. Majority gives every query the best fixed answer (perplexity: token "
    "frequencies of the training texts). Dense is the recorded run without experts. In brackets: 95% "
    "interval. n: queries, images or tokens."
)


@dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    run: str
    step: int
    date: str
    results: list[dict[str, Any]]
    routing: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def value(self, metric: str) -> float:
        """The value of one metric; KeyError if it was left out."""
        return {row["metric"]: row["value"] for row in self.results}[metric]


def read_dense(path: Path | None, test: Sequence[str]) -> dict[str, float] | None:
    """The dense run's values by metric, or None where none are recorded for the shards ``test``."""
    if path is None or not path.is_file():
        return None
    try:
        record = read_json(path)["dense"]
        if list(record["test"]) != list(test):
            return None
        return {row["metric"]: float(row["value"]) for row in record["results"]}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{path} records no dense run ({brief(f'{type(error).__name__}: {error}')}); it should hold "
            f'{{"dense": {{"test": [...], "results": [...]}}}}; make compare records it'
        ) from error


def rows_of(scores: Sequence[Score], dense: dict[str, float] | None) -> list[dict[str, Any]]:
    """Scores with the dense run's value beside each."""
    return [asdict(s) | {"interval": list(s.interval), "dense": (dense or {}).get(s.metric)} for s in scores]


def write(report: Report, directory: Path) -> None:
    """``report.json`` and ``report.md``, replacing those of an earlier evaluation."""
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False, allow_nan=False)
    (directory / "report.json").write_text(text + "\n", encoding="utf-8")
    (directory / "report.md").write_text(markdown(report), encoding="utf-8")


def markdown(report: Report) -> str:
    """The report as a page of tables."""
    lines = [f"# {report.run}, step {report.step}", "", f"Evaluated {report.date} on held-out rows.", ""]
    lines += table(COLUMNS, [_cells(row) for row in report.results])
    lines += ["", LEGEND]
    if report.notes:
        lines += ["", "## Notes", ""] + [f"- {note}" for note in report.notes]
    if report.routing["layers"]:
        picture = report.routing["picture"]
        lines += ["", "## Which experts serve which modality", ""] + ([f"![]({picture})", ""] if picture else [])
        lines += _routing_lines(report.routing["layers"])
    return "\n".join(lines) + "\n"


def print_table(report: Report) -> None:
    """The results on the console; what a score is made of ("speech_to_text_r10/fr") is in report.md."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{report.run}, step {report.step}: held-out rows", title_justify="left", box=SIMPLE_HEAD)
    hidden = {"candidates"} if console.width >= 100 else {"candidates", "95%"}  # report.md has them all
    shown = [i for i, column in enumerate(COLUMNS) if column not in hidden]
    for i in shown:
        table.add_column(COLUMNS[i], justify="right" if i else "left", no_wrap=True)
    for row in report.results:
        if "/" in row["metric"]:
            continue
        cells = _cells(row)
        table.add_row(*[cells[i] for i in shown])
    console.print(table)
    for layer in report.routing["layers"]:
        console.print(f"layer {layer['layer']}: {specialisation_line(layer)}", highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", style="dim", highlight=False)


def specialisation_line(layer: dict[str, Any]) -> str:
    """One layer's specialisation and its dead experts in words."""
    dead = len(layer["dead"])
    return (
        f"specialisation {layer['specialisation']:.0%} "
        f"({layer['specialisation_bits']:.2f} of {layer['modality_bits']:.2f} bits; "
        f"untrained {layer['specialisation_untrained']:.0%}), "
        f"{dead if dead else 'no'} dead expert{'' if dead == 1 else 's'} of {layer['experts']}"
    )


COLUMNS = ("metric", "value", "95%", "chance", "majority", "dense", "n", "candidates")


def _cells(row: dict[str, Any]) -> list[str]:
    unit = row["unit"]
    low, high = row["interval"]
    return [
        row["metric"],
        _number(row["value"], unit),
        f"[{_number(low, unit)}, {_number(high, unit)}]",
        _number(row["chance"], unit),
        _number(row["majority"], unit),
        NOT_RECORDED if row["dense"] is None else _number(row["dense"], unit),
        f"{row['n']:,}",
        "-" if row["candidates"] is None else f"{row['candidates']:,}",
    ]


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "share":
        return f"{100 * value:.1f}%"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _routing_lines(layers: Sequence[dict[str, Any]]) -> list[str]:
    columns = (
        "layer",
        "modality",
        "tokens",
        "experts used",
        "entropy (bits)",
        "dropped",
        "most used experts",
    )
    rows = []
    for layer in layers:
        for name, share in layer["share"].items():
            top = sorted(range(len(share)), key=lambda e: -share[e])[:4]
            rows.append(
                [
                    *modality_cells(layer, name),
                    ", ".join(f"{e}: {share[e]:.0%}" for e in top),
                ]
            )
    summary = [f"- layer {layer['layer']}: {specialisation_line(layer)}" for layer in layers]
    legend = (
        "Specialisation is the mutual information of modality and expert, every modality weighing the "
        "same; experts used is exp of the entropy of a modality's shares; an expert is dead below 1% of "
        "an even share in every modality. Untrained is the same model before its first step, on the same "
        "rows: not 0%, since the modalities enter with different embeddings."
    )
    return [*summary, "", *table(columns, rows), "", legend]


def modality_cells(layer: dict[str, Any], name: str) -> list[str]:
    """Layer, modality, tokens, experts used, entropy and share dropped, as a table shows them."""
    return [
        str(layer["layer"]),
        name,
        f"{layer['tokens'][name]:,.0f}",
        f"{layer['experts_used'][name]:.1f} of {layer['experts']}",
        f"{layer['entropy_bits'][name]:.2f}",
        f"{layer['dropped'][name]:.1%}",
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    header = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return header + ["| " + " | ".join(row) + " |" for row in rows]
