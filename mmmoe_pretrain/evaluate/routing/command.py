"""``mmmoe routing``: one pass of a trained model over held-out rows, and the report of its routing.

Owns the order of the steps and ``routing.json``, which holds every number of the pages:
``{"run", "step", "test", "samples", "layers": [summary of evaluate/routing_report.py, "free_experts", "pairs",
"mean_probability", "specialisation_by_task", "task_specialisation", "top_tokens"], "notes"}``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmmoe_pretrain.checkpoint import load_model
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import eval_settings
from mmmoe_pretrain.data.pack import origins, pack
from mmmoe_pretrain.evaluate import heatmap, routing_report
from mmmoe_pretrain.evaluate.features import add_routing, collect_routing, device_of
from mmmoe_pretrain.evaluate.routing import figures, history, page, sheets
from mmmoe_pretrain.evaluate.routing.top_tokens import TopToken, TopTokens, watch
from mmmoe_pretrain.evaluate.routing_report import array
from mmmoe_pretrain.evaluate.rows import HeldOutRows, open_rows, overridden, place_of_report
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import token_info

REPORT = "routing/routing.json"
STRONGEST_PAIRS = 5  # of experts, a modality
TOP = 8  # tokens of an expert and modality


@dataclass(frozen=True)
class Pass:
    """The results of one pass over the rows: sums by layer, and each expert's top-activating tokens."""

    samples: int
    stats: tuple[RoutingStats, ...]
    top_tokens: TopTokens


def routing_command(
    run_dir: Path, test: Sequence[str], out: Path | None, top: int, overrides: Sequence[str] = ()
) -> None:
    """Write the report, and print its folder."""
    folder = write_report(run_dir, test, out, top, overrides)
    print(f"wrote {folder / 'index.md'}")


def write_report(
    run_dir: Path,
    test_paths: Sequence[str] | None = None,
    out: Path | None = None,
    top: int = TOP,
    overrides: Sequence[str] = (),
) -> Path:
    """The report of the newest checkpoint in ``out`` (default: ``run_dir``/routing, unless a report of other shards
    is there); returns the folder.

    ValueError for a dense run, and where no held-out shards are named or they hold no sample.
    """
    if top < 1:
        raise ValueError(f"--top {top} would list nothing; give 1 or more")
    model, config, step = load_model(run_dir, overrides)
    if config.moe.dense:
        raise ValueError(
            f"{run_dir} is a dense model (moe.num_experts: 1): it has no routing to "
            f"show; give a run with moe.num_experts of 2 or more"
        )
    rows = open_rows(run_dir, config, test_paths)
    folder = place_of_report(run_dir, REPORT, rows.paths, out)
    found = run_pass(model, rows, top)
    untrained = collect_routing(PretrainingModel(config).mmmoe.eval(), rows.batches())
    layers = [_summary(stats, before, config) for stats, before in zip(found.stats, untrained, strict=True)]
    report = {
        "run": config.name, "step": step, "test": rows.paths, "samples": found.samples, "layers": layers,
        "notes": overridden(overrides) + rows.notes(),
    }  # fmt: skip
    for old in (*folder.glob("layer_*"), *folder.glob("training_*.png"), folder / "coactivation.png"):
        old.unlink(missing_ok=True)  # of an earlier report with more layers or experts
    drawn = _figures(found, layers, run_dir, folder)
    for layer in layers:
        _layer_page(layer, found.top_tokens, rows, folder)
    (folder / "index.md").write_text(page.index(report, drawn), encoding="utf-8")
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / Path(REPORT).name).write_text(text + "\n", encoding="utf-8")
    return folder


def run_pass(model: MMMoE, rows: HeldOutRows, top: int) -> Pass:
    """One pass of ``model`` over ``rows``; recording does not change its outputs."""
    stats: tuple[RoutingStats, ...] = ()
    top_tokens, seen = TopTokens(top), 0
    settings = eval_settings(rows.config, rows.modalities)
    with torch.inference_mode(), watch(model) as decisions:
        for samples, positions in rows.samples():
            batch = pack(samples, settings, positions)
            stats = add_routing(stats, model(batch.to(device_of(model)))[1])
            where = origins(samples, settings, positions)
            top_tokens.add(decisions, token_info(batch, model.names), where, samples)
            decisions.clear()
            seen += len(samples)
    if not seen:
        raise ValueError(f"{', '.join(rows.paths)}: no held-out sample is left; check --test")
    return Pass(seen, stats, top_tokens)


def _summary(stats: RoutingStats, untrained: RoutingStats, config: RunConfig) -> dict[str, Any]:
    moe = config.moe.for_layer(stats.layer)
    last = moe.num_experts + moe.identity_experts
    free = {"identity": range(moe.num_experts, last), "null": range(last, moe.router_outputs)}
    tokens_M, probability_ME = array(stats.tokens_M), array(stats.probability_ME)
    seen = [(m, name) for m, name in enumerate(stats.names.modalities) if tokens_M[m]]
    return {
        **routing_report.summarise_layer(stats, untrained),
        **routing_report.summarise_tasks(array(stats.counts_MXE), stats.names),
        "free_experts": {kind: list(numbers) for kind, numbers in free.items() if numbers},
        "mean_probability": {name: (probability_ME[m] / tokens_M[m]).tolist() for m, name in seen},
        "pairs": {
            name: routing_report.strongest_pairs(array(stats.coactivation_MEE[m]), tokens_M[m], STRONGEST_PAIRS)
            for m, name in seen
        },
    }


def _figures(found: Pass, layers: Sequence[dict[str, Any]], run_dir: Path, folder: Path) -> dict[str, list[str]]:
    panels = [_load_panel(layer, stats.names.modalities) for layer, stats in zip(layers, found.stats, strict=True)]
    heatmap.save(heatmap.draw(panels, "Where each modality's tokens go"), folder / "load.png")
    pairs = [(stats.layer, array(stats.coactivation_MEE.sum(0))) for stats in found.stats]
    together = figures.coactivation(pairs, folder / "coactivation.png")
    past = history.read(run_dir / "metrics.jsonl")
    training = figures.load_over_steps(past, folder) if past else []
    if past:
        figures.change_over_steps(past, folder / "training_change.png")
    return {
        "load": ["load.png"],
        "coactivation": ["coactivation.png"] if together else [],
        "training": [*training, "training_change.png"] if past else [],
    }


def _load_panel(layer: dict[str, Any], modalities: tuple[str, ...]) -> heatmap.Panel:
    absent = np.full(layer["experts"], np.nan)
    columns = [np.asarray(layer["share"].get(m, absent)) for m in modalities]
    return heatmap.Panel(f"layer {layer['layer']}", np.stack(columns, axis=1), modalities)


def _layer_page(layer: dict[str, Any], search: TopTokens, rows: HeldOutRows, folder: Path) -> None:
    """The layer's page and sheets; its top-activating tokens go into ``layer`` too."""
    number = layer["layer"]
    found = [_top_tokens(search, layer, expert) for expert in range(layer["experts"])]
    names: dict[str, list[str]] = {}
    for name, share_E in layer["share"].items():
        lines = [sheets.Row(expert, share_E[expert], by[name]) for expert, by in enumerate(found) if name in by]
        title = f"Layer {number}: top-activating tokens of {name}"
        drawn = sheets.draw(title, rows.modalities[name], lines)
        names[name] = [f"layer_{number:02d}_{name}_{i}.png" for i in range(len(drawn))]
        for file, image_HWC in zip(names[name], drawn, strict=True):
            heatmap.save(image_HWC, folder / file)
    layer["top_tokens"] = [{m: [_plain(top, rows) for top in tokens] for m, tokens in by.items()} for by in found]
    text = page.layer_page(layer, found, names, rows.modalities)
    (folder / page.page_name(number)).write_text(text, encoding="utf-8")


def _top_tokens(search: TopTokens, layer: dict[str, Any], expert: int) -> dict[str, list[TopToken]]:
    """The top-activating tokens of the modalities that the expert serves with more than a tenth of an even share."""
    return {
        modality: tokens
        for modality, tokens in search.of(layer["layer"], expert).items()
        if sheets.worth_a_look(layer["share"][modality][expert], layer["experts"])
    }


def _plain(top: TopToken, rows: HeldOutRows) -> dict[str, Any]:
    return {
        "sample": top.sample.meta.key,
        "item": top.number,
        "token": top.token,
        "probability": top.probability,
        "log_probability": top.log_p,
        "task": top.task,
        **rows.modalities[top.modality].describe(top.item.value, top.token),
    }
