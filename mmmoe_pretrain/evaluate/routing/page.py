"""The pages of the routing report in Markdown: ``index.md``, and a page of favourites a layer.

Owns the words. Numbers come as the values of ``routing.json`` (see ``command.py``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmmoe_pretrain.batch import MODALITIES
from mmmoe_pretrain.config import AudioConfig
from mmmoe_pretrain.evaluate.report import modality_cells, specialisation_line, table
from mmmoe_pretrain.evaluate.routing.favourites import Favourite
from mmmoe_pretrain.evaluate.routing.sheets import percent, seconds
from mmmoe_pretrain.modalities import TextCodec

CONTEXT = 48  # characters shown on either side of a piece
BEGIN, END = "⟨begin⟩", "⟨end⟩"
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$])")


def index(report: dict[str, Any], pictures: dict[str, list[str]]) -> str:
    """The first page. ``pictures``: section -> file names."""
    layers = report["layers"]
    lines = [f"# Routing of {report['run']}, step {report['step']}", ""]
    lines += [
        f"{report['samples']:,} held-out samples went through the model once; every token's way through the "
        f"mixture layers was written down. Patches are tokens of an image, stretches of sound tokens of audio, "
        f"pieces of words tokens of text.",
        "",
    ]
    lines += [f"- layer {layer['layer']}: {specialisation_line(layer)}" for layer in layers]
    lines += ["", *_modality_section(layers, pictures["load"])]
    lines += _task_section(layers)
    lines += _together_section(layers, pictures["coactivation"])
    lines += _training_section(pictures["training"])
    lines += ["## What each expert likes best", ""]
    lines += [f"- [layer {layer['layer']}]({page_name(layer['layer'])})" for layer in layers]
    if report["notes"]:
        lines += ["", "## Notes", ""] + [f"- {note}" for note in report["notes"]]
    return "\n".join(lines) + "\n"


def layer_page(
    layer: dict[str, Any], favourites: Sequence[dict[str, list[Favourite]]], sheets: dict[str, list[str]],
    codec: TextCodec, audio: AudioConfig,
) -> str:  # fmt: skip
    """What the experts of one layer like best; ``favourites[e]`` are those of expert e by modality."""
    lines = [f"# Layer {layer['layer']}: what each expert likes best", ""]
    lines += [
        "Of the held-out tokens that an expert served, those to which the router gave it the highest "
        "probability (in percent), from different pictures, clips and texts as far as there are enough. A modality "
        "is left out where the expert gets less than a tenth of an even share of it. "
        "Experts are numbered from 0. [Back to the report](index.md).",
        "",
    ]
    if layer["free_experts"]:
        lines += [f"Experts without computation: {_free(layer['free_experts'])}.", ""]
    for modality, title in (
        ("image", "Image patches. The frame marks the patch; its neighbours are what the model sees around it."),
        ("audio", "Sound. Spectrograms (low pitch at the bottom, loud is dark); seconds count from the beginning "
                  "of the clip without its silent start."),
    ):  # fmt: skip
        if sheets[modality]:
            lines += [title, ""] + [f"![{modality} favourites]({name})\n" for name in sheets[modality]]
    for expert, found in enumerate(favourites):
        lines += _expert_section(layer, expert, found, codec, audio)
    return "\n".join(lines) + "\n"


def page_name(layer: int) -> str:
    return f"layer_{layer:02d}.md"


def marked(token: Favourite, codec: TextCodec) -> str:
    """A text piece in bold within its text, in Markdown; the begin and end marks are named."""
    ids = token.sample.text
    assert ids is not None
    pieces = [BEGIN, *(codec.piece(i) for i in ids), END]
    place = token.place
    before = "".join(pieces[1:place]).replace("▁", " ") if place > 1 else ""
    after = "".join(pieces[place + 1 : -1]).replace("▁", " ")
    piece = pieces[place].replace("▁", " ")
    gap = " " if piece != piece.lstrip() and before else ""
    before = before.lstrip()
    if len(before) > CONTEXT:
        before = "…" + before[-CONTEXT:]
    if len(after) > CONTEXT:
        after = after[:CONTEXT] + "…"
    word = piece.strip() or "␣"  # a piece can be the space alone
    return f"{escaped(before)}{gap}**{escaped(word)}**{escaped(after)}"


def escaped(text: str) -> str:
    """Plain text for a cell of a Markdown table."""
    return MARKDOWN.sub(r"\\\1", text.replace("\n", " "))


def _modality_section(layers: Sequence[dict[str, Any]], pictures: Sequence[str]) -> list[str]:
    columns = ("layer", "modality", "tokens", "experts used", "entropy (bits)", "dropped", "dead experts")
    rows = [
        [
            *modality_cells(layer, name),
            _numbers(layer["dead"]),
        ]
        for layer in layers
        for name in layer["share"]
    ]
    legend = (
        "A column of the picture is a modality and shows where its tokens go: an expert that is bright in one "
        "column and dark in the others is a specialist. Specialisation is the mutual information of modality and "
        "expert, every modality weighing the same: 0% if all modalities use the experts alike, 100% if the expert "
        "tells the modality. Untrained is the same model before its first step. Experts used is the number that an "
        "even use would need; entropy is of the router's distribution for a token, low where it is sure; dropped is "
        "the share of assignments for which an expert had no room; an expert is dead below 1% of an even share in "
        "every modality."
    )
    shown = [f"![Which experts serve which modality]({name})\n" for name in pictures]
    return ["## Which experts serve which modality", "", *shown, *table(columns, rows), "", legend, ""]


def _task_section(layers: Sequence[dict[str, Any]]) -> list[str]:
    tasks = list(dict.fromkeys(task for layer in layers for task in layer["specialisation_by_task"]))
    if len(tasks) < 2:
        return []
    columns = ("layer", *(f"specialisation in {task}" for task in tasks), *(f"task in {m}" for m in MODALITIES))
    rows = [
        [
            str(layer["layer"]),
            *(_or_dash(layer["specialisation_by_task"].get(task)) for task in tasks),
            *(_or_dash(layer["task_specialisation"].get(m)) for m in MODALITIES),
        ]
        for layer in layers
    ]
    legend = (
        "Left: specialisation over the tokens of one task alone. Right: how far the expert tells the task of a "
        "token of that modality (mutual information of task and expert; 0% if both tasks use the experts alike)."
    )
    return ["## Which experts serve which task", "", *table(columns, rows), "", legend, ""]


def _together_section(layers: Sequence[dict[str, Any]], pictures: Sequence[str]) -> list[str]:
    lines = ["## Which experts work together", ""]
    if not pictures:
        return [*lines, "Every token has one expert, so no two of them work together.", ""]
    rows = [
        [str(layer["layer"]), name, ", ".join(f"{a} + {b}: {share:.0%}" for a, b, share in pairs)]
        for layer in layers
        for name, pairs in layer["pairs"].items()
    ]
    legend = (
        "A row of the picture is an expert, and its colours say which other experts its tokens visit too. "
        "The table has the pairs that serve the most tokens, as shares of the modality's tokens."
    )
    lines += [f"![Which experts work together]({name})\n" for name in pictures]
    return [*lines, *table(("layer", "modality", "strongest pairs"), rows), "", legend, ""]


def _training_section(pictures: Sequence[str]) -> list[str]:
    lines = ["## How routing changed in training", ""]
    if not pictures:
        return [*lines, "The run's metrics.jsonl has no two records of this mixture.", ""]
    legend = (
        "From metrics.jsonl. Change is the share of a modality's assignments that moved to other experts since the "
        "record before (total variation distance); a part of it is chance, since every record is of another batch."
    )
    return [*lines, *(f"![Routing in training]({name})\n" for name in pictures), legend, ""]


def _expert_section(
    layer: dict[str, Any], expert: int, found: dict[str, list[Favourite]], codec: TextCodec, audio: AudioConfig
) -> list[str]:
    shares = [f"{percent(row[expert])} of {name}" for name, row in layer["share"].items()]
    lines = [f"## Expert {expert}", "", f"Serves {', '.join(shares)}.", ""]
    if found.get("text"):
        rows = [
            [percent(t.probability), marked(t, codec), escaped(t.sample.meta.language), t.task,
             escaped(t.sample.meta.key)]
            for t in found["text"]
        ]  # fmt: skip
        lines += [*table(("", "text piece", "language", "task", "sample"), rows), ""]
    if found.get("audio"):
        rows = [
            [percent(t.probability), "{:.2f} to {:.2f} s".format(*seconds(t.place, audio)),
             escaped(t.sample.raw_text), escaped(t.sample.meta.language), t.task, escaped(t.sample.meta.key)]
            for t in found["audio"]
        ]  # fmt: skip
        lines += [*table(("", "sound", "what is said", "language", "task", "sample"), rows), ""]
    if found.get("image"):
        named = [f"{escaped(t.sample.meta.key)} ({percent(t.probability)})" for t in found["image"]]
        lines += [f"Pictures, as in the sheet above: {', '.join(named)}.", ""]
    return lines


def _free(experts: dict[str, list[int]]) -> str:
    return "; ".join(f"{kind}: {_numbers(numbers)}" for kind, numbers in experts.items())


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(str(value) for value in values) if values else "none"


def _or_dash(share: float | None) -> str:
    return "-" if share is None else percent(share)
