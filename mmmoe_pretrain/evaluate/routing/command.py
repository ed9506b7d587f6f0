"""``mmmoe routing``: one pass of a trained model over held-out rows, and the report of its routing.

Owns the order of the steps and ``routing.json``, which holds every number of the pages:
``{"run", "step", "test", "samples", "layers": [summary of evaluate/routing_report.py, "free_experts", "pairs",
"mean_probability", "specialisation_by_task", "task_specialisation", "top_tokens"], "notes"}``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmmoe_pretrain.checkpoint import load_model
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import eval_settings
from mmmoe_pretrain.data.pack import origins, pack
from mmmoe_pretrain.evaluate import heatmap, routing_report
from mmmoe_pretrain.evaluate.features import add_routing, device_of
from mmmoe_pretrain.evaluate.routing import figures, history, page, sheets
from mmmoe_pretrain.evaluate.routing.top_tokens import TopToken, TopTokens, watch
from mmmoe_pretrain.evaluate.routing_report import array
from mmmoe_pretrain.evaluate.rows import HeldOutRows, open_rows, place_of_report, untrained_routing
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import token_info

REPORT = "routing/routing.json"
STRONGEST_PAIRS = 5  # of experts, a modality
TOP = 8  # tokens of an expert and modality


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
    samples, routing, top_tokens = run_pass(model, rows, top)
    layers = [_summary(*pair, config) for pair in zip(routing, untrained_routing(rows), strict=True)]
    report = {
        "run": config.name, "step": step, "test": rows.paths, "samples": samples, "layers": layers,
        "notes": rows.notes(overrides),
    }  # fmt: skip
    for old in (*folder.glob("layer_*"), *folder.glob("training_*.png"), folder / "coactivation.png"):
        old.unlink(missing_ok=True)  # of an earlier report with more layers or experts
    together, training = _figures(routing, layers, run_dir, folder)
    for layer in layers:
        _layer_page(layer, top_tokens, rows, folder)
    (folder / "index.md").write_text(page.index(report, together, training), encoding="utf-8")
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / Path(REPORT).name).write_text(text + "\n", encoding="utf-8")
    return folder


def run_pass(model: MMMoE, rows: HeldOutRows, top: int) -> tuple[int, tuple[RoutingStats, ...], TopTokens]:
    """One pass of ``model`` over ``rows``: the number of samples, the sums of routing by layer, and each expert's
    top-activating tokens. Recording does not change the model's outputs."""
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
    return seen, stats, top_tokens


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


def _figures(
    routing: Sequence[RoutingStats], layers: Sequence[dict[str, Any]], run_dir: Path, folder: Path
) -> tuple[bool, list[str]]:
    """Whether there is a figure of experts that work together, and the names of the figures of training."""
    modalities = routing[0].names.modalities
    panels = [
        heatmap.Panel(
            f"layer {layer['layer']}",
            np.stack([layer["share"].get(m, [np.nan] * layer["experts"]) for m in modalities], axis=1),
            modalities,
        )
        for layer in layers
    ]
    heatmap.save(heatmap.draw(panels, "Where each modality's tokens go"), folder / "load.png")
    pairs = [(stats.layer, array(stats.coactivation_MEE.sum(0))) for stats in routing]
    together = figures.coactivation(pairs, folder / "coactivation.png")
    past = history.read(run_dir / "metrics.jsonl")
    if not past:
        return together, []
    figures.change_over_steps(past, folder / "training_change.png")
    return together, [*figures.load_over_steps(past, folder), "training_change.png"]


def _layer_page(layer: dict[str, Any], search: TopTokens, rows: HeldOutRows, folder: Path) -> None:
    """The layer's page and sheets; its top-activating tokens go into ``layer`` too."""
    number = layer["layer"]
    found = [
        {  # modalities that the expert serves with more than a tenth of an even share
            modality: tokens
            for modality, tokens in search.of(number, expert).items()
            if sheets.worth_a_look(layer["share"][modality][expert], layer["experts"])
        }
        for expert in range(layer["experts"])
    ]
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
