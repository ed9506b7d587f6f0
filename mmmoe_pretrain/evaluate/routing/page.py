"""The pages of the routing report in Markdown: ``index.md``, and a page of top-activating tokens a layer.

Owns the text. Numbers come as the values of ``routing.json`` (see ``command.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmmoe_pretrain.evaluate.features import first_text
from mmmoe_pretrain.evaluate.report import layer_lines, modality_section, table
from mmmoe_pretrain.evaluate.routing.sheets import percent
from mmmoe_pretrain.evaluate.routing.top_tokens import TopToken
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.modalities.base import in_markdown


def index(report: dict[str, Any], together: bool, training: Sequence[str]) -> str:
    """The first page. ``together``: there is a figure of experts that work together; ``training``: the names of the
    figures of routing in training."""
    layers = report["layers"]
    lines = [f"# Routing of {report['run']}, step {report['step']}", ""]
    lines += [
        f"One pass of the model over {report['samples']:,} held-out samples; it records which experts every token "
        f"reached in every MoE layer.",
        "",
    ]
    lines += [*layer_lines(layers), "", *modality_section(layers, "load.png"), ""]
    lines += [
        "A column of the figure is a modality and shows where its tokens go: an expert that is bright in one column "
        "and dark in the others is specialised on that modality.",
        "",
    ]
    lines += _task_section(layers)
    lines += _together_section(layers, together)
    lines += _training_section(training)
    lines += ["## Top-activating tokens of each expert", ""]
    lines += [f"- [layer {layer['layer']}]({page_name(layer['layer'])})" for layer in layers]
    if report["notes"]:
        lines += ["", "## Notes", ""] + [f"- {note}" for note in report["notes"]]
    return "\n".join(lines) + "\n"


def layer_page(
    layer: dict[str, Any], found: Sequence[dict[str, list[TopToken]]], sheets: dict[str, list[str]],
    modalities: Mapping[str, Modality],
) -> str:  # fmt: skip
    """The top-activating tokens of one layer's experts; ``found[e]`` are those of expert e by modality."""
    lines = [f"# Layer {layer['layer']}: top-activating tokens of each expert", ""]
    lines += [
        "The held-out tokens of an expert with the highest router probability (in percent), from different items "
        "if there are enough. A modality is omitted if the expert gets "
        "less than a tenth of an even share of it. Experts are numbered from 0. [Back to the report](index.md).",
        "",
    ]
    if layer["free_experts"]:
        free = "; ".join(f"{kind}: {', '.join(map(str, of))}" for kind, of in layer["free_experts"].items())
        lines += [f"Experts without computation: {free}.", ""]
    for modality, names in sheets.items():
        if names:
            lines += [f"Tokens of {modality}; the frame marks the token in its item.", ""]
            lines += [f"![Top-activating tokens of {modality}]({name})\n" for name in names]
    for expert, by_modality in enumerate(found):
        lines += _expert_section(layer, expert, by_modality, modalities)
    return "\n".join(lines) + "\n"


def page_name(layer: int) -> str:
    return f"layer_{layer:02d}.md"


def _task_section(layers: Sequence[dict[str, Any]]) -> list[str]:
    tasks = list(dict.fromkeys(task for layer in layers for task in layer["specialisation_by_task"]))
    modalities = list(dict.fromkeys(name for layer in layers for name in layer["task_specialisation"]))
    if len(tasks) < 2:
        return []
    columns = ("layer", *(f"specialisation in {task}" for task in tasks), *(f"task in {m}" for m in modalities))
    rows = [
        [
            str(layer["layer"]),
            *(_or_dash(layer["specialisation_by_task"].get(task)) for task in tasks),
            *(_or_dash(layer["task_specialisation"].get(m)) for m in modalities),
        ]
        for layer in layers
    ]
    legend = (
        "Left: specialisation over the tokens of one task alone. Right: how much of a token's task its expert "
        "determines, by modality (mutual information of task and expert; 0% if all tasks use the experts equally)."
    )
    return ["## Which experts serve which task", "", *table(columns, rows), "", legend, ""]


def _together_section(layers: Sequence[dict[str, Any]], together: bool) -> list[str]:
    lines = ["## Which experts are chosen together", ""]
    if not together:
        return [*lines, "Every token has one expert, so there are no pairs.", ""]
    rows = [
        [str(layer["layer"]), name, ", ".join(f"{a} + {b}: {share:.0%}" for a, b, share in pairs)]
        for layer in layers
        for name, pairs in layer["pairs"].items()
    ]
    legend = (
        "A row of the figure is an expert; its colours show the other experts of its tokens. "
        "The table has the pairs that serve the most tokens, as shares of the modality's tokens."
    )
    lines += ["![Which experts are chosen together](coactivation.png)", ""]
    return [*lines, *table(("layer", "modality", "strongest pairs"), rows), "", legend, ""]


def _training_section(figures: Sequence[str]) -> list[str]:
    lines = ["## How routing changed in training", ""]
    if not figures:
        return [*lines, "The run's metrics.jsonl has no two records of these MoE layers.", ""]
    legend = (
        "From metrics.jsonl. Change is the share of a modality's assignments that moved to other experts since the "
        "previous record (total variation distance); some of it is noise, because every record is of another batch."
    )
    return [*lines, *(f"![Routing in training]({name})\n" for name in figures), legend, ""]


def _expert_section(
    layer: dict[str, Any], expert: int, found: dict[str, list[TopToken]], modalities: Mapping[str, Modality]
) -> list[str]:
    shares = [f"{percent(row[expert])} of {name}" for name, row in layer["share"].items()]
    lines = [f"## Expert {expert}", "", f"Serves {', '.join(shares)}.", ""]
    for name in (name for name in layer["share"] if name in found):
        rows = [
            [
                percent(top.probability),
                modalities[name].caption(top.item.value, top.token),
                "" if top.item.raw else in_markdown(first_text(top.sample)),
                in_markdown(top.sample.meta.language),
                top.task,
                in_markdown(top.sample.meta.key),
            ]
            for top in found[name]
        ]
        titles = ("", f"token of {name}", "text of the sample", "language", "task", "sample")
        shown = [i for i, title in enumerate(titles) if not title or any(row[i] for row in rows)]
        lines += [*table([titles[i] for i in shown], [[row[i] for i in shown] for row in rows]), ""]
    return lines


def _or_dash(share: float | None) -> str:
    return "-" if share is None else percent(share)
