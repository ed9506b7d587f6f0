"""``mmmoe routing``: one pass of a trained model over held-out rows, and the report of its routing.

Owns the order of the steps and ``routing.json``, of which ``page.py`` makes ``routing.html``:
``{"version", "run", "step", "test", "samples", "layers": [summary of evaluate/routing_report.py, "free_experts",
"pairs", "mean_probability", "concepts", "consistency", "ablation", "beside", "shown", "top_tokens"], "history",
"media", "left_out", "notes", "beside"}``. The page docs/expert_layer.md describes each.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmmoe_pretrain.checkpoint.model import SavedRun, open_run
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import eval_settings
from mmmoe_pretrain.data.pack import origins, pack
from mmmoe_pretrain.evaluate import routing_report
from mmmoe_pretrain.evaluate.features import add_routing, device_of
from mmmoe_pretrain.evaluate.routing import history, page, sample_shares, selection, stability
from mmmoe_pretrain.evaluate.routing.ablation import measure, open_ablation
from mmmoe_pretrain.evaluate.routing.html import rounded
from mmmoe_pretrain.evaluate.routing.media import Media
from mmmoe_pretrain.evaluate.routing.sample_shares import MOST_VIEWS, SampleShares, most_samples, view_of
from mmmoe_pretrain.evaluate.routing.top_tokens import TopTokens, watch
from mmmoe_pretrain.evaluate.routing_report import array
from mmmoe_pretrain.evaluate.rows import HeldOutRows, open_rows, place_of_report, untrained_routing
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.moe.tokens import token_info
from mmmoe_pretrain.parallel.runtime import named_device
from mmmoe_pretrain.paths import new_file

REPORT, PAGE = "routing.json", "routing.html"
STRONGEST_PAIRS = 5  # of experts, a modality
TOP = 8  # tokens of an expert and modality


def routing_command(
    run_dir: Path,
    test: Sequence[str],
    out: Path | None,
    top: int,
    overrides: Sequence[str] = (),
    device: str = "auto",
    ablate: int | None = None,
    beside: Path | None = None,
) -> None:
    """Write the report, and print where it is."""
    folder = write_report(run_dir, test, out, top, overrides, device, ablate, beside)
    print(f"wrote {folder / PAGE}, {folder / REPORT}")


def write_report(
    run_dir: Path,
    test_paths: Sequence[str] | None = None,
    out: Path | None = None,
    top: int = TOP,
    overrides: Sequence[str] = (),
    device: str = "auto",
    ablate: int | None = None,
    beside: Path | None = None,
) -> Path:
    """The report of the newest checkpoint in ``out`` (default: ``run_dir``, unless a report of other shards is
    there); returns the folder. ``device``: of ``named_device``. ``ablate``: held-out samples on which the losses
    without each expert are measured (``ablation.py``). ``beside``: another run, whose division of the same tokens is
    compared (``stability.py``).

    ValueError for a dense run, and where no held-out shards are named or they hold no sample.
    """
    if top < 1:
        raise ValueError(f"--top {top} would list nothing; give 1 or more")
    run = open_run(run_dir, overrides)
    config, step = run.config, run.checkpoint.step
    if config.moe.dense:
        raise ValueError(
            f"{run_dir} is a dense model (moe.num_experts: 1): it has no routing to "
            f"show; give a run with moe.num_experts of 2 or more"
        )
    other = None if beside is None else _open_beside(beside, run).to(named_device(device))
    model = run.model().to(named_device(device))
    rows = open_rows(run_dir, config, test_paths)
    folder = place_of_report(run_dir, REPORT, rows.paths, out)
    tried, ablation_notes = (None, []) if ablate is None else open_ablation(model, rows, run_dir, ablate)
    seen = run_pass(model, rows, top)
    untrained = untrained_routing(rows, device_of(model))
    layers = [_summary(*pair, config) for pair in zip(seen.routing, untrained, strict=True)]
    for layer in layers:
        layer |= sample_shares.summarise(seen.shares, seen.views, layer["layer"], list(layer["share"]))
    for layer, found in zip(layers, () if tried is None else measure(tried, seen.routing), strict=False):
        layer["ablation"] = found
    if other is not None:
        agreement = stability.compare(model, other, rows)
        for layer in layers:
            layer["beside"] = agreement.get(layer["layer"], {})
    report = rounded({
        "version": page.VERSION, "run": config.name, "step": step, "test": rows.paths, "samples": seen.samples,
        "layers": layers, "history": history.in_json(history.read(run_dir / "metrics.jsonl")),
        "notes": rows.notes(overrides) + ablation_notes, "beside": None if beside is None else beside.resolve().name,
    })  # fmt: skip
    html = selection.fill(report, seen.top_tokens, Media(rows), rows.modalities)
    text = json.dumps(report, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for name, content in ((REPORT, text + "\n"), (PAGE, html)):
        with new_file(folder / name) as draft:
            draft.write_text(content, encoding="utf-8")
    return folder


def _open_beside(run_dir: Path, own: SavedRun) -> MMMoE:
    other = open_run(run_dir)
    stability.check_same_tokens(own, other, str(run_dir))
    return other.model()


@dataclass(frozen=True)
class Pass:
    """What a pass over the held-out rows found: the sums of routing by layer, each expert's top-activating tokens,
    and the experts' shares of the first samples, and of views of them."""

    samples: int
    routing: tuple[RoutingStats, ...]
    top_tokens: TopTokens
    shares: SampleShares
    views: SampleShares


def run_pass(model: MMMoE, rows: HeldOutRows, top: int) -> Pass:
    """One pass of ``model`` over ``rows``, and over views of the first. Recording does not change the outputs."""
    stats: tuple[RoutingStats, ...] = ()
    most = most_samples(sum(router.config.router_outputs for router in model.routers) * len(model.names.modalities))
    top_tokens, shares, views, seen = TopTokens(top), SampleShares(most), SampleShares(min(most, MOST_VIEWS)), 0
    settings = eval_settings(rows.config, rows.modalities)
    with torch.inference_mode(), watch(model) as decisions:
        for samples, positions in rows.samples():
            batch = pack(samples, settings, positions)
            stats = add_routing(stats, model(batch.to(device_of(model)))[1])
            where, tokens = origins(samples, settings, positions), token_info(batch, model.names)
            top_tokens.add(decisions, tokens, where, samples)
            shares.add(decisions, tokens, where, samples)
            decisions.clear()
            if not views.full:
                changed = [view_of(its, rows.modalities, n) for its, n in zip(samples, positions, strict=False)]
                batch = pack(changed, settings, positions)
                model(batch.to(device_of(model)))
                views.add(decisions, token_info(batch, model.names), origins(changed, settings, positions), changed)
                decisions.clear()
            seen += len(samples)
    if not seen:
        raise ValueError(f"{', '.join(rows.paths)}: no held-out sample is left; check --test")
    return Pass(seen, stats, top_tokens, shares, views)


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
