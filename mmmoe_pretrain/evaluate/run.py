"""Evaluate a run: load, pass once over the held-out shards, score, report.

Owns the order of the steps; each step is in its own file.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from mmmoe_pretrain.checkpoint import load_model, trained_module
from mmmoe_pretrain.config import EvaluateConfig
from mmmoe_pretrain.data.evaluation import text_batches
from mmmoe_pretrain.evaluate import (
    correlated,
    figures,
    generation,
    imputation,
    latents,
    report,
    routing_report,
    scores,
    subsets,
)
from mmmoe_pretrain.evaluate.features import HeldOut, collect, device_of, encode
from mmmoe_pretrain.evaluate.perplexity import count_train_targets
from mmmoe_pretrain.evaluate.report import Report
from mmmoe_pretrain.evaluate.rows import (
    BATCH_SIZE,
    HeldOutRows,
    are_same,
    open_rows,
    place_of_report,
    untrained_routing,
)
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.objectives import Objective
from mmmoe_pretrain.parallel.runtime import named_device

FIGURE = "routing.png"


def evaluate(
    run_dir: Path,
    test_paths: Sequence[str] | None = None,
    beside: Path | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    device: str = "auto",
) -> Report:
    """Score the newest checkpoint of ``run_dir``; write report.json, report.md and routing.png to ``out`` (default:
    ``run_dir``, unless a report of other shards is there).

    ``test_paths`` are folders of held-out shards (default: the run's ``evaluate.test``). ``beside``: the folder or
    report.json of another run, whose values are shown too. ``device``: of ``named_device``.
    """
    other = None if beside is None else report.read(beside)
    model, config, step = load_model(run_dir, overrides, named_device(device))
    rows = open_rows(run_dir, config, test_paths)
    folder = place_of_report(run_dir, report.JSON, rows.paths, out)
    shown, beside_notes = _beside(other, rows.paths)
    pairs = correlated.pairs_of(model.objectives, config.evaluate)
    cases = imputation.cases_of(model.objectives, config.evaluate)
    bank = imputation.bank_of(model, rows, cases)
    data = collect(model, rows.batches(), correlated.sides_of_all(pairs))
    found, notes = _joined(
        [
            *_score(data, model, rows, run_dir),
            *imputation.scores_of(data, model, rows, run_dir, cases, bank),
            *latents.scores_of(data, model, rows, run_dir),
            *generation.scores_of(model, rows),
        ]
    )
    before = untrained_routing(rows, device_of(model)) if data.routing else ()
    layers = [
        routing_report.summarise_layer(trained, untrained)
        | routing_report.summarise_tasks(routing_report.array(trained.counts_MXE), trained.names)
        for trained, untrained in zip(data.routing, before, strict=True)
    ]
    drawn = figures.shares(layers, model.names.modalities, folder / FIGURE)
    result = Report(
        run=config.name,
        step=step,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        test=rows.paths,
        results=report.rows_of(found, shown),
        routing={"layers": layers, "figure": FIGURE if drawn else None},
        notes=rows.notes(overrides) + _notes(rows, data) + _untrained(model, config.evaluate) + beside_notes + notes,
    )
    report.write(result, folder)
    return result


def evaluate_command(
    run_dir: Path,
    test: list[str],
    beside: Path | None,
    out: Path | None,
    overrides: Sequence[str],
    device: str = "auto",
) -> None:
    """``mmmoe evaluate``: evaluate and show the table."""
    result = evaluate(run_dir, test, beside, out, overrides, device)
    report.print_table(result)
    written = [report.PAGE, report.JSON, *filter(None, [result.routing["figure"]])]
    print(f"wrote {', '.join(str((out or run_dir) / name) for name in written)}")


def _joined(parts: Sequence[scores.Scored]) -> scores.Scored:
    return [s for found, _ in parts for s in found], [n for _, more in parts for n in more]


def _score(data: HeldOut, model: MMMoE, rows: HeldOutRows, run_dir: Path) -> list[scores.Scored]:
    settings, objectives = rows.config.evaluate, model.objectives
    pairs = objectives.scored(settings.pairs)
    parts = [scores.retrieval_scores(data, pair, settings) for pair in pairs]
    parts += correlated.scores_of(data, model, rows)
    parts += subsets.scores_of(data, model, rows)
    for source, target in [way for a, b in pairs for way in ((a, b), (b, a))]:
        (reader, *more) = objectives.representations[target].modalities
        if rows.modalities[reader].needs_tokenizer and not more:  # of texts alone
            class_features = functools.partial(_class_features, model, rows, reader, target)
            parts.append(scores.zero_shot_scores(data, (source, target), class_features, settings))
    parts += [
        _anchor_scores(data, objective, rows, run_dir) for objective in objectives.values() if objective.anchor_size
    ]
    parts += [
        scores.class_scores(data, task, its.representations[0], its.settings)
        for task, its in objectives.classifying.items()
    ]
    train, notes = _train_counts(data, rows)
    for task, predicted in data.predicted.items():
        found = scores.perplexity_scores(task, predicted, train.get(task), model.names.modalities, settings)
        nothing = [] if found else [f"no held-out row has a target of {task}: no {task}_perplexity"]
        parts.append((found, nothing))
    return [*parts, ([], notes)]


def _anchor_scores(data: HeldOut, objective: Objective, rows: HeldOutRows, run_dir: Path) -> scores.Scored:
    """Zero-shot of the representations that ``objective`` brings near anchors, by the anchors of the class names."""
    encode = functools.partial(objective.class_features, trained_module(run_dir, rows.config, objective))
    classes = sorted({meta.label for meta in data.metas} - {""})
    unknown = {name for name in classes if not encode([name]).any()}
    metas = tuple(dataclasses.replace(meta, label="") if meta.label in unknown else meta for meta in data.metas)
    known, settings = dataclasses.replace(data, metas=metas), rows.config.evaluate
    plain = settings.model_copy(update={"prompt": "{}"})  # its words would move all anchors together
    parts = [
        scores.zero_shot_scores(known, (rep, objective.name), encode, plain) for rep in objective.representations
    ]
    named = f"{', '.join(sorted(unknown)[:5])}{', ...' * (len(unknown) > 5)}"
    notes = [f"no word of {named} has a vector: {objective.name} does not score these classes"] if unknown else []
    found, more = _joined(parts)
    return found, more + notes


def _class_features(model: MMMoE, rows: HeldOutRows, reader: str, target: str, texts: list[str]) -> np.ndarray:
    return encode(model, target, text_batches(texts, reader, rows.config, rows.modalities, BATCH_SIZE))


def _train_counts(data: HeldOut, rows: HeldOutRows) -> tuple[dict[str, np.ndarray], list[str]]:
    """Token counts of training targets by task, if there are targets to score and shards to count."""
    if not any(predicted.targets_V.any() for predicted in data.predicted.values()):
        return {}, []
    if absent := rows.absent_training:
        return {}, [f"no majority for perplexity: the training shards {absent} are missing"]
    counts, samples = count_train_targets(rows.config, rows.modalities)
    return counts, [f"the perplexity baseline (column majority) is a unigram model of {samples:,} training samples"]


def _beside(other: Report | None, paths: Sequence[str]) -> tuple[Report | None, list[str]]:
    """``other`` where it is of the shards ``paths``, and what a reader must know of it."""
    if other is None:
        return None, []
    if not are_same(other.test, paths):
        return None, [
            f"no column of {other.run}: its report is of {', '.join(other.test) or 'no shards'}, and not of "
            f"{', '.join(paths)}"
        ]
    return other, [
        f"column {other.run}: that run at step {other.step}, evaluated {other.date}; - where it has no such score, "
        f"or one with another n"
    ]


def _untrained(model: MMMoE, settings: EvaluateConfig) -> list[str]:
    trained = {frozenset(pair) for pair in model.objectives.aligned}
    pairs = [pair for pair in model.objectives.scored(settings.pairs) if frozenset(pair) not in trained]
    return [f"{a} and {b} were never compared in training (evaluate.pairs)" for a, b in pairs]


def _notes(rows: HeldOutRows, data: HeldOut) -> list[str]:
    notes = []
    if data.damaged:
        notes.append(f"{data.damaged} held-out samples could not be decoded and are not scored")
    notes += [
        f"class names were trained as {name} (modalities.{name}.label_probability): zero-shot is over unseen items, "
        f"not over unseen classes; the candidates are the classes of the held-out items"
        for name, modality in rows.modalities.items()
        if modality.label_probability > 0
    ]
    return notes
