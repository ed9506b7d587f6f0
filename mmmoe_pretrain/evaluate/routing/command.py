"""``mmmoe routing``: a trained mixture, one pass over held-out rows, and the report of its routing.

Owns the order of the steps and ``routing.json``, which holds every number of the pages:
``{"run", "step", "test", "samples", "layers": [summary of evaluate/routing_report.py, "free_experts", "pairs",
"mean_probability", "specialisation_by_task", "task_specialisation", "favourites"], "notes"}``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmmoe_pretrain.batch import MODALITIES
from mmmoe_pretrain.checkpoint import load_model
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.evaluate import heatmap, routing_report
from mmmoe_pretrain.evaluate.features import collect_routing, routing_totals
from mmmoe_pretrain.evaluate.routing import history, page, pictures, sheets
from mmmoe_pretrain.evaluate.routing.favourites import Favourite, FavouriteSearch
from mmmoe_pretrain.evaluate.routing.record import origins, watch
from mmmoe_pretrain.evaluate.routing_report import RoutingTotals
from mmmoe_pretrain.evaluate.rows import HeldOutRows, open_rows, overridden, place_of_report
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import token_info

REPORT = "routing/routing.json"
STRONGEST_PAIRS = 5  # of experts, a modality
TOP = 8  # favourites of an expert and modality


@dataclass(frozen=True)
class Pass:
    """What one pass over the rows leaves: sums by layer, and each expert's favourites."""

    samples: int
    stats: tuple[RoutingStats, ...]
    favourites: FavouriteSearch


def routing_command(
    run_dir: Path, test: Sequence[str], out: Path | None, top: int, overrides: Sequence[str] = ()
) -> None:
    """Write the report, and say where it is."""
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
            f"{run_dir} is a dense model (moe.num_experts: 1): every token goes the same way, so there is no "
            f"routing to show; give a run with moe.num_experts of 2 or more"
        )
    rows = open_rows(run_dir, config, test_paths)
    folder = place_of_report(run_dir, REPORT, rows.paths, out)
    found = run_pass(model, rows, top)
    untrained = collect_routing(PretrainingModel(config, rows.codecs.text.vocab_size).mmmoe.eval(), rows.batches())
    layers = [_summary(stats, before, config) for stats, before in zip(found.stats, untrained, strict=True)]
    report = {
        "run": config.name, "step": step, "test": rows.paths, "samples": found.samples, "layers": layers,
        "notes": overridden(overrides) + rows.notes(),
    }  # fmt: skip
    for old in (*folder.glob("layer_*"), *folder.glob("training_*.png"), folder / "coactivation.png"):
        old.unlink(missing_ok=True)  # of an earlier report with more layers or experts
    drawn = _pictures(found, layers, run_dir, folder)
    for layer in layers:
        _layer_page(layer, found.favourites, rows, folder)
    (folder / "index.md").write_text(page.index(report, drawn), encoding="utf-8")
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / Path(REPORT).name).write_text(text + "\n", encoding="utf-8")
    return folder


def run_pass(model: MMMoE, rows: HeldOutRows, top: int) -> Pass:
    """One pass of ``model`` over ``rows``; its outputs are what they are without being watched."""
    stats: tuple[RoutingStats, ...] = ()
    favourites, samples = FavouriteSearch(top), 0
    device = next(model.parameters()).device
    with torch.inference_mode(), watch(model) as decisions:
        for batch, of_batch in rows.batches():
            output = model(batch.to(device))
            stats = tuple(a + b for a, b in zip(stats, output.routing, strict=True)) if stats else output.routing
            tasks = token_info(batch).task_ids_n.numpy()
            favourites.add(decisions, origins(batch, rows.config.modalities), tasks, of_batch)
            decisions.clear()
            samples += len(of_batch)
    if not samples:
        raise ValueError(f"{', '.join(rows.paths)}: no held-out sample is left to look at; check --test")
    return Pass(samples, stats, favourites)


def _summary(stats: RoutingStats, untrained: RoutingTotals, config: RunConfig) -> dict[str, Any]:
    totals = routing_totals(stats)
    moe = config.moe.for_layer(stats.layer)
    last = moe.num_experts + moe.identity_experts
    free = {"identity": range(moe.num_experts, last), "null": range(last, moe.router_outputs)}
    seen = np.flatnonzero(totals.tokens_M).tolist()
    return {
        **routing_report.summarise_layer(totals, untrained),
        **routing_report.summarise_tasks(stats.counts_MXE.double().cpu().numpy()),
        "free_experts": {kind: list(numbers) for kind, numbers in free.items() if numbers},
        "mean_probability": {MODALITIES[m]: (totals.probability_ME[m] / totals.tokens_M[m]).tolist() for m in seen},
        "pairs": {
            MODALITIES[m]: routing_report.strongest_pairs(
                stats.coactivation_MEE[m].double().cpu().numpy(), totals.tokens_M[m], STRONGEST_PAIRS
            )
            for m in seen
        },
    }


def _pictures(found: Pass, layers: Sequence[dict[str, Any]], run_dir: Path, folder: Path) -> dict[str, list[str]]:
    panels = [_load_panel(layer) for layer in layers]
    heatmap.save(heatmap.draw(panels, "Where each modality's tokens go"), folder / "load.png")
    pairs = [(s.layer, s.coactivation_MEE.sum(0).double().cpu().numpy()) for s in found.stats]
    together = pictures.coactivation(pairs, folder / "coactivation.png")
    past = history.read(run_dir / "metrics.jsonl")
    training = pictures.load_over_steps(past, folder) if past else []
    if past:
        pictures.change_over_steps(past, folder / "training_change.png")
    return {
        "load": ["load.png"],
        "coactivation": ["coactivation.png"] if together else [],
        "training": [*training, "training_change.png"] if past else [],
    }


def _load_panel(layer: dict[str, Any]) -> heatmap.Panel:
    absent = np.full(layer["experts"], np.nan)
    columns = [np.asarray(layer["share"].get(m, absent)) for m in MODALITIES]
    return heatmap.Panel(f"layer {layer['layer']}", np.stack(columns, axis=1), MODALITIES)


def _layer_page(layer: dict[str, Any], search: FavouriteSearch, rows: HeldOutRows, folder: Path) -> None:
    """The layer's page and sheets; its favourites go into ``layer`` too."""
    number, modalities = layer["layer"], rows.config.modalities
    found = [_favourites(search, layer, expert) for expert in range(layer["experts"])]
    names: dict[str, list[str]] = {}
    for modality, title in (("image", "image patches"), ("audio", "stretches of sound")):
        lines = [
            sheets.Row(expert, layer["share"][modality][expert], by[modality])
            for expert, by in enumerate(found)
            if modality in by
        ]
        drawn = sheets.draw(f"Layer {number}: the {title} that each expert likes best", modality, lines, modalities)
        names[modality] = [f"layer_{number:02d}_{modality}_{i}.png" for i in range(len(drawn))]
        for name, image_HWC in zip(names[modality], drawn, strict=True):
            heatmap.save(image_HWC, folder / name)
    layer["favourites"] = [{m: [_plain(t, rows) for t in tokens] for m, tokens in by.items()} for by in found]
    text = page.layer_page(layer, found, names, rows.codecs.text, modalities.audio)
    (folder / page.page_name(number)).write_text(text, encoding="utf-8")


def _favourites(search: FavouriteSearch, layer: dict[str, Any], expert: int) -> dict[str, list[Favourite]]:
    """Of the modalities that the expert serves more than by accident."""
    return {
        modality: tokens
        for modality, tokens in search.of(layer["layer"], expert).items()
        if sheets.worth_a_look(layer["share"][modality][expert], layer["experts"])
    }


def _plain(token: Favourite, rows: HeldOutRows) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "sample": token.sample.meta.key,
        "place": token.place,
        "probability": token.probability,
        "log_probability": token.log_p,
        "task": token.task,
    }
    if token.modality == "image":
        plain["pixels"] = list(sheets.patch_box(token.place, rows.config.modalities.image))
    elif token.modality == "audio":
        plain["seconds"] = [round(second, 4) for second in sheets.seconds(token.place, rows.config.modalities.audio)]
    else:
        plain["text"] = page.marked(token, rows.codecs.text)
    return plain
