"""Evaluate a run: load, pass once over the held-out shards, score, report.

Owns the order of the steps; each step is in its own file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mmmoe_pretrain.batch import Batch, Sample
from mmmoe_pretrain.checkpoint import load_model
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import text_batches
from mmmoe_pretrain.evaluate import picture, report, routing_report, scores, unigrams
from mmmoe_pretrain.evaluate.features import HeldOut, collect, collect_routing, encode_texts
from mmmoe_pretrain.evaluate.report import Report
from mmmoe_pretrain.evaluate.rows import BATCH_SIZE, open_rows, overridden, place_of_report, trains_on
from mmmoe_pretrain.evaluate.scores import Score
from mmmoe_pretrain.modalities import Codecs
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.models.pretraining import PretrainingModel

Batches = Iterable[tuple[Batch, list[Sample]]]
PICTURE = "routing.png"


def evaluate(
    run_dir: Path,
    test_paths: Sequence[str] | None = None,
    dense_results: Path | None = None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
) -> Report:
    """Score the newest checkpoint of ``run_dir``; write report.json, report.md and routing.png to ``out`` (default:
    ``run_dir``, unless a report of other shards is there).

    ``test_paths`` are folders of held-out shards (default: the run's ``evaluate.test``).
    """
    model, config, step = load_model(run_dir, overrides)
    rows = open_rows(run_dir, config, test_paths)
    folder = place_of_report(run_dir, report.JSON, rows.paths, out)
    codecs = rows.codecs
    dense = report.read_dense(dense_results, rows.paths)
    data = collect(model, rows.batches(), codecs.text.vocab_size)
    found, notes = _score(data, model, config, codecs)
    layers = _routing(data, rows.batches(), config, codecs)
    notes += rows.leaks.notes() if rows.leaks else []
    drawn = picture.draw(layers, folder / PICTURE)
    result = Report(
        run=config.name,
        step=step,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        test=rows.paths,
        results=report.rows_of(found, dense),
        routing={"layers": layers, "picture": PICTURE if drawn else None},
        notes=overridden(overrides) + _notes(rows.paths, config, data, dense, dense_results) + notes,
    )
    report.write(result, folder)
    return result


def evaluate_command(
    run_dir: Path, test: list[str], dense_results: Path | None, out: Path | None, overrides: Sequence[str]
) -> None:
    """``mmmoe evaluate``: evaluate and show the table."""
    result = evaluate(run_dir, test, dense_results, out, overrides)
    report.print_table(result)
    written = [report.PAGE, report.JSON, *filter(None, [result.routing["picture"]])]
    print(f"wrote {', '.join(str((out or run_dir) / name) for name in written)}")


def _score(data: HeldOut, model: MMMoE, config: RunConfig, codecs: Codecs) -> tuple[list[Score], list[str]]:
    def encode(texts: list[str]) -> np.ndarray:
        return encode_texts(model, text_batches(texts, config, codecs, BATCH_SIZE))

    settings = config.evaluate
    rows = scores.matching_rows(data, settings.image_rows)
    train_V, caption_notes = _train_counts(data, config, codecs)
    parts = [
        scores.image_text_scores(data, rows, settings.min_clips_per_language),
        scores.audio_scores(data, "text", settings.min_clips_per_language),
        scores.audio_scores(data, "image", settings.min_clips_per_language),
        scores.zero_shot_scores(data, rows, encode, settings.prompt),
        scores.caption_scores(data, train_V),
    ]
    notes = [n for _, part in parts for n in part] + caption_notes + _not_scored(data, config, rows)
    return [s for found, _ in parts for s in found], notes


def _not_scored(data: HeldOut, config: RunConfig, rows: Sequence[int]) -> list[str]:
    """What the run trains, and the held-out rows cannot show."""
    notes = []
    if config.evaluate.image_rows and not any(data.content["image"][i] for i in rows):
        notes.append(f"no held-out row with an image has {config.evaluate.image_rows} (evaluate.image_rows)")
    contrastive = config.objectives.contrastive
    for pair in (pair for pair, weight in contrastive.pairs.items() if weight and contrastive.weight):
        one, other = (data.content[modality] for modality in pair.split("-"))
        if not any(a and b for a, b in zip(one, other, strict=True)):
            notes.append(f"no held-out row has both {pair.replace('-', ' and ')}: no score of them")
    if config.objectives.captioning.weight and not data.captions.targets_V.any():
        notes.append("no held-out row has a text with an image or audio: no caption_perplexity")
    return notes


def _routing(data: HeldOut, batches: Batches, config: RunConfig, codecs: Codecs) -> list[dict[str, Any]]:
    """Each layer's routing beside that of the same model before its first step."""
    if not data.routing:
        return []
    untrained = PretrainingModel(config, codecs.text.vocab_size).mmmoe.eval()
    before = collect_routing(untrained, batches)
    return [routing_report.summarise_layer(a, b) for a, b in zip(data.routing, before, strict=True)]


def _train_counts(data: HeldOut, config: RunConfig, codecs: Codecs) -> tuple[np.ndarray | None, list[str]]:
    """Token counts of training captions, where there are captions to score and shards to count."""
    if not data.captions.targets_V.any():
        return None, []
    absent = [source.path for source in config.data.train if not Path(source.path).is_dir()]
    if absent:
        return None, [f"no majority for caption_perplexity: the training shards {absent[0]} are not here"]
    counts_V, captions = unigrams.count_train_tokens(config, codecs)
    return counts_V, [f"the majority of caption_perplexity is of {captions:,} training captions"]


def _notes(
    paths: Sequence[str],
    config: RunConfig,
    data: HeldOut,
    dense: dict[str, float] | None,
    dense_results: Path | None,
) -> list[str]:
    notes = []
    empty = sum(not any(names) for names in zip(*data.content.values(), strict=True))
    if empty:
        notes.append(f"{empty} held-out samples could not be decoded and take no part")
    notes += [f"{path} is trained on: these scores are not of held-out rows" for path in trains_on(paths, config)]
    if config.data.label_text > 0:
        notes.append(
            "class names were trained as texts (data.label_text): zero_shot is over unseen pictures, not over "
            "unseen classes; its classes are those of the held-out pictures"
        )
    if dense_results and dense is None:
        notes.append(f"{dense_results} records no dense run for these shards")
    return notes
