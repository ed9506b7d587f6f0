"""The page of the routing report: an HTML file made of the values of ``routing.json`` and the template ``page.html``.

It needs no network and no other file, and can be read without JavaScript, which adds sorting, a slider over the steps
of training, and the playing of spans. Its policy lets the browser run and load nothing but what is in the file.
``docs/expert_layer.md`` describes the JSON.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from mmmoe_pretrain.evaluate.heatmap import scale_top
from mmmoe_pretrain.evaluate.report import specialisation_line
from mmmoe_pretrain.evaluate.routing import token_html
from mmmoe_pretrain.evaluate.routing.html import (
    COLOURS,
    Line,
    attribute,
    chart,
    data,
    largest,
    level,
    number,
    percent,
    scrolling,
    table,
    text,
)

VERSION = 1  # of the JSON; another is refused
KEYS = (
    "Specialisation is the mutual information of modality and expert, with equal weights of all modalities: 0% if "
    "all modalities use the experts equally, 100% if the expert determines the modality. Untrained is the same model "
    "before its first step, on the same rows. Experts used is the exponential of the entropy of a modality's shares. "
    "Dropped is the share of assignments for which the expert was over capacity. An expert is dead below 1% of an "
    "even share in every modality."
)
TASK_KEYS = (
    "Left: specialisation over the tokens of one task alone. Right: how much of a token's task its expert "
    "determines, by modality (mutual information of task and expert; 0% if all tasks use the experts equally)."
)
HISTORY_KEYS = (
    "From metrics.jsonl. Change is the share of a modality's assignments that moved to other experts; some of it is "
    "noise, because every record is of another batch."
)
ABLATION_KEYS = (
    "How much each held-out loss rises if tokens may not choose the expert, for all tokens and for those of one "
    "modality; below 0 the loss falls. A dash: no token reaches the expert, which was not tried."
)
CONSISTENCY_KEYS = (
    "Divergence: of the experts' shares of two samples' tokens (Jensen-Shannon, in bits: 0 equal, 1 no expert in "
    "common). Same expert: how often both have the same most used expert. Views are a sample and a changed copy "
    "(crops; of texts some pieces); paraphrases are two texts of what shows the same. Unlike: pairs that do not."
)
CONCEPT_KEYS = (
    "Words of the texts and classes of samples that stand out among what an expert got of a modality, by log-odds "
    "with a prior, with their z-scores. A sample counts by the share of its tokens that the expert got."
)
TOKEN_KEYS = (
    "The held-out tokens of an expert with the highest router probability, from different items if there are enough. "
    "A modality is omitted if the expert gets less than a tenth of an even share of it."
)


def render(report: dict[str, Any]) -> str:
    """The page of the values of ``routing.json``. ValueError for those of another version."""
    if report.get("version") != VERSION:
        raise ValueError(
            f"routing.json has version {report.get('version')!r}, and this page is made of version {VERSION}; "
            f"write it again with mmmoe routing RUN"
        )
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    style, script = (re.findall(rf"<{tag}>(.*?)</{tag}>", template, re.DOTALL)[0] for tag in ("style", "script"))
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'; base-uri 'none'; form-action 'none'"
    )
    return Template(template).substitute(
        policy=escape(policy),
        title=attribute(f"Routing of {report['run']}, step {report['step']}"),
        thumbnails="".join(token_html.thumbnail(number, its) for number, its in enumerate(report["media"])),
        body="".join(_body(report)),
        history=data(list(_slider_data(report))),
    )


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _body(report: dict[str, Any]) -> Iterator[str]:
    layers = [layer for layer in report["layers"] if layer["shown"]]
    history = {its["layer"]: its for its in report["history"]}
    yield f"<h1>Routing of {text(report['run'])}, step {report['step']:,}</h1>\n"
    yield (
        f"<p>One pass of the model over {report['samples']:,} held-out samples; it records which experts every token "
        f"reached in every MoE layer. Experts are numbered from 0.</p>\n"
    )
    yield from (f"<p>{sentence}</p>\n" for sentence in left_out(report))
    yield from _summary(report["layers"])
    yield from _specialisation_chart(report["history"])
    yield "<h2>Layers</h2>\n"
    top = scale_top([np.array([*layer["share"].values()]) for layer in layers if layer["share"]] or [np.zeros(1)])[0]
    for layer in layers:
        yield from _layer(layer, report["media"], history.get(layer["layer"]), top / 100, layer is layers[0])
    if any(its["sound"] for its in report["media"]):
        yield "<h2>Sounds</h2>\n<p>The clips that tokens are of, resampled and trimmed as for the model.</p>\n"
        yield from (token_html.clip(number, its) for number, its in enumerate(report["media"]))
    if report["notes"]:
        yield f"<h2>Notes</h2>\n<ul>{''.join(f'<li>{text(note, 1000)}</li>' for note in report['notes'])}</ul>\n"


def left_out(report: dict[str, Any]) -> list[str]:
    """What did not fit into the page, in sentences."""
    counts = {name: count for name, count in report["left_out"].items() if count}
    if not counts:
        return []
    names = {
        "layers": "layers (they are in the first table)", "tokens": "top-activating tokens",
        "thumbnails": "images", "sounds": "sounds",
    }  # fmt: skip
    parts = ", ".join(f"{count:,} {names[name]}" for name, count in counts.items())
    return [f"Left out, so that this page stays small: {parts}. routing.json has the numbers of all layers."]


def _summary(layers: Sequence[dict[str, Any]]) -> Iterator[str]:
    modalities = list(dict.fromkeys(name for layer in layers for name in layer["share"]))
    yield "<h2>Which experts serve which modality</h2>\n"
    heads = ["layer", "experts", "dead experts", "specialisation", "untrained"]
    heads += [f"experts used by {text(m, 40)}" for m in modalities]
    heads += [f"{text(m, 40)} dropped" for m in modalities]
    yield table("Layers by modality", heads, [
        [
            _link(layer), str(layer["experts"]), str(len(layer["dead"])),
            percent(layer["specialisation"]), percent(layer["specialisation_untrained"]),
            *(number(layer["experts_used"].get(m), ".1f") for m in modalities),
            *(percent(layer["dropped"].get(m)) for m in modalities),
        ]
        for layer in layers
    ], ' id="layers"')  # fmt: skip
    yield f'<p class="quiet">{KEYS}</p>\n'
    tasks = list(dict.fromkeys(task for layer in layers for task in layer["specialisation_by_task"]))
    told = list(dict.fromkeys(name for layer in layers for name in layer["task_specialisation"]))
    if len(tasks) > 1:
        yield "<h2>Which experts serve which task</h2>\n"
        heads = [
            "layer",
            *(f"specialisation in {text(t, 40)}" for t in tasks),
            *(f"task in {text(m, 40)}" for m in told),
        ]
        yield table("Layers by task", heads, [
            [
                _link(layer), *(percent(layer["specialisation_by_task"].get(t)) for t in tasks),
                *(percent(layer["task_specialisation"].get(m)) for m in told),
            ]
            for layer in layers
        ])  # fmt: skip
        yield f'<p class="quiet">{TASK_KEYS}</p>\n'


def _link(layer: dict[str, Any]) -> str:
    number = layer["layer"]
    return f'<a href="#layer-{number}">{number}</a>' if layer["shown"] else str(number)


def _specialisation_chart(history: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "<h2>How routing changed in training</h2>\n"
    if not history:
        yield "<p>The run's metrics.jsonl has no two records of these MoE layers.</p>\n"
        return
    lines = [(f"layer {its['layer']}", f"c{i % COLOURS}", its["specialisation"]) for i, its in enumerate(history)]
    longest = max((its["steps"] for its in history), key=len)
    lines = [line for line, its in zip(lines, history, strict=True) if its["steps"] == longest]
    yield chart("Specialisation of each layer", longest, lines, 1.0)
    if len(lines) <= COLOURS:
        yield _key(lines)


def _key(lines: Sequence[Line]) -> str:
    """Which line is of what."""
    marks = "".join(
        f'<span><svg viewBox="0 0 16 5" aria-hidden="true"><path class="{kind}" d="M0 2.5H16"/></svg> '
        f"{text(name, 40)}</span>"
        for name, kind, _ in lines
    )
    return f'<p class="key quiet">{marks}</p>\n'


def _layer(
    layer: dict[str, Any], media: Sequence[dict[str, Any]], history: dict[str, Any] | None, top: float, is_first: bool
) -> Iterator[str]:
    name = layer["layer"]
    yield f'<details{" open" if is_first else ""}><summary><h3 id="layer-{name}">Layer {name}</h3>: '
    yield f"{specialisation_line(layer)}</summary>\n"
    if layer["dead"]:
        yield f"<p>Dead experts: {attribute(', '.join(map(str, layer['dead'])), 2000)}.</p>\n"
    yield from (
        f"<p>Experts without computation ({text(kind, 40)}): {attribute(', '.join(map(str, of)), 2000)}.</p>\n"
        for kind, of in layer["free_experts"].items()
    )
    yield table(
        f"Modalities in layer {name}",
        ["modality", "tokens", "experts used", "entropy (bits)", "dropped", "strongest pairs of experts"],
        [
            [
                text(m, 40), f"{layer['tokens'][m]:,.0f}", number(layer["experts_used"][m], ".1f"),
                number(layer["entropy_bits"][m], ".2f"), percent(layer["dropped"][m]),
                ", ".join(f"{a} + {b}: {percent(share)}" for a, b, share in layer["pairs"].get(m, ())) or "–",
            ]
            for m in layer["share"]
        ],
    )  # fmt: skip
    yield f"<h4>Shares of each expert in layer {name}</h4>\n"
    yield f'<div class="slider" id="slider-{name}"></div>\n'
    yield _load_table(layer, top)
    yield from _consistency(layer)
    yield from _concepts(layer)
    if "ablation" in layer:
        yield from _ablation(layer)
    if history is not None:
        yield from _charts(history)
    yield from _experts(layer, media)
    yield "</details>\n"


def _load_table(layer: dict[str, Any], top: float) -> str:
    """A row an expert: its shares of the assignments of each modality and of each task, as shades."""
    tasks = layer["share_by_task"] if len(layer["share_by_task"]) > 1 else {}
    heads = ["expert", *(text(m, 40) for m in layer["share"]), *(f"task {text(t, 40)}" for t in tasks)]
    columns = [*layer["share"].values(), *tasks.values()]
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    rows = []
    for expert in range(layer["experts"]):
        shown = any(layer["top_tokens"][expert].values())
        name = f'<a href="#layer-{layer["layer"]}-expert-{expert}">{expert}</a>' if shown else str(expert)
        cells = "".join(f'<td class="h{level(its[expert], top)}">{percent(its[expert])}</td>' for its in columns)
        rows.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    body = "\n".join(rows)
    return scrolling(
        f"Shares of each expert in layer {layer['layer']}",
        f'<table id="load-{layer["layer"]}" data-top="{top:.6g}"><caption class="quiet">Share of all assignments of '
        f"the modality or task; even: {percent(1 / layer['experts'])}; darkest: {percent(top)} and more.</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>",
    )


def _consistency(layer: dict[str, Any]) -> Iterator[str]:
    """Of views and paraphrases by modality, and beside another run."""
    if layer.get("beside"):
        parts = ", ".join(f"{text(name, 40)} {number(its, '.2f')}" for name, its in layer["beside"].items())
        yield f"<p>Agreement with the other run's experts (adjusted mutual information, 1: the same): {parts}.</p>\n"
    found = layer.get("consistency", {})
    rows = [
        [
            f"{what}, {text(name, 40)}", f"{its['pairs']:,}", number(its["divergence"], ".3f"),
            number(its["divergence_unlike"], ".3f"), percent(its["same_expert"]), percent(its["same_expert_unlike"]),
        ]
        for what, by_modality in found.items()
        for name, its in by_modality.items()
    ]  # fmt: skip
    if rows:
        heads = ["pairs of", "pairs", "divergence", "unlike", "same expert", "unlike"]
        yield table(f"Consistency of routing in layer {layer['layer']}", heads, rows)
        yield f'<p class="quiet">{CONSISTENCY_KEYS}</p>\n'


def _concepts(layer: dict[str, Any]) -> Iterator[str]:
    """A row an expert that has some: its words by modality."""
    found = layer.get("concepts", [])
    names = [name for name in layer["share"] if any(name in its for its in found)]
    if not names:
        return
    yield f"<h4>Concepts of each expert in layer {layer['layer']}</h4>\n"
    yield table(f"Concepts of each expert in layer {layer['layer']}", ["expert", *(text(m, 40) for m in names)], [
        [
            str(expert),
            *(", ".join(f"{text(word, 40)} {z:.1f}" for word, z in its.get(name, ())) or "–" for name in names),
        ]
        for expert, its in enumerate(found)
        if its
    ])  # fmt: skip
    yield f'<p class="quiet">{CONCEPT_KEYS}</p>\n'


def _ablation(layer: dict[str, Any]) -> Iterator[str]:
    """A row an expert: the rise of each loss without it."""
    losses, without = layer["ablation"]["loss"], layer["ablation"]["without"]
    masks = ["all", *(name for name in layer["share"] if any(name in of for of in without))]
    columns = [(mask, loss) for mask in masks for loss in losses]
    yield f"<h4>What is lost without each expert in layer {layer['layer']}</h4>\n"
    heads = [f"{text(loss, 40)}, {'all tokens' if mask == 'all' else text(mask, 40)}" for mask, loss in columns]
    yield table(f"Losses without each expert in layer {layer['layer']}", ["expert", *heads], [
        ["none (the loss)", *(number(losses[loss], ".4g") if mask == "all" else "" for mask, loss in columns)],
        *(
            [str(expert), *(number(of.get(mask, {}).get(loss), "+.2g") for mask, loss in columns)]
            for expert, of in enumerate(without)
        ),
    ])  # fmt: skip
    yield f'<p class="quiet">{ABLATION_KEYS}</p>\n'


def _charts(history: dict[str, Any]) -> Iterator[str]:
    named = [(name, f"c{i % COLOURS}") for i, name in enumerate(history["modalities"])]
    used, change = (
        [(*both, values) for both, values in zip(named, history[what], strict=True)]
        for what in ("experts_used", "change")
    )
    yield '<div class="row">\n'
    yield chart("Experts used", history["steps"], used, largest(used, 1.0), lambda value: f"{value:.1f}")
    yield chart("Change since the previous record", history["steps"], change, largest(change, 0.01))
    yield f"</div>\n{_key(used)}"
    yield f'<p class="quiet">{HISTORY_KEYS}</p>\n'


def _experts(layer: dict[str, Any], media: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not any(any(found.values()) for found in layer["top_tokens"]):
        return
    yield f"<h4>Top-activating tokens of each expert in layer {layer['layer']}</h4>\n"
    yield f'<p class="quiet">{TOKEN_KEYS}</p>\n'
    for expert, found in enumerate(layer["top_tokens"]):
        if not any(found.values()):
            continue
        shares = ", ".join(f"{percent(row[expert])} of {text(name, 40)}" for name, row in layer["share"].items())
        yield f'<section class="expert" id="layer-{layer["layer"]}-expert-{expert}">'
        yield f"<h4>Expert {expert}: {shares}</h4>\n"
        for name, tokens in found.items():
            if tokens:
                yield f'<h5>{text(name, 40)}</h5><ul class="tokens">\n'
                yield from (token_html.token(its, media) for its in tokens)
                yield "</ul>\n"
        yield "</section>\n"


def _slider_data(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the slider shows: shares in ten thousandths by step, modality and expert, and their columns."""
    shown = {layer["layer"]: layer for layer in report["layers"] if layer["shown"]}
    for its in report["history"]:
        layer = shown.get(its["layer"])
        names = list(layer["share"]) if layer else []
        both = [(m, names.index(name) + 1) for m, name in enumerate(its["modalities"]) if name in names]
        if layer is None or not both or len(its["load"][0][0]) != layer["experts"]:
            continue
        load = [
            [[None if share is None else round(10_000 * share) for share in step[m]] for m, _ in both]
            for step in its["load"]
        ]
        yield {
            "layer": its["layer"],
            "columns": [column for _, column in both],
            "steps": its["load_steps"],
            "load": load,
        }
