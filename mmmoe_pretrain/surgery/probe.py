"""Is the function the same? Two models on one batch, and which experts its tokens choose.

The batch is of noise, or of held-out samples where the run's shards are on this machine.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmmoe_pretrain.batch import Batch, Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import eval_settings, iterate_eval
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.data.sources.source import NoShards
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.untrusted import brief, parse_json

SAMPLES = 16
LOGGED_STEPS = 20
# Features are unit rows and compared absolutely, likelihoods relatively. fp32 rounding ends near 1e-6;
# an expert with a wrong factor moves both by 1e-2 and more.
TOLERANCE = 1e-4


def noise_batch(config: RunConfig, packed: RunConfig | None = None) -> Batch:
    """Samples of noise with all modalities of ``config``, each of which every objective uses; ``packed``: as a run of
    this config packs them."""
    modalities = build_modalities(config.modalities, decoding=False)
    rng = np.random.default_rng(0)
    samples = []
    for i in range(SAMPLES):
        items = (Item(name, modality.example(rng, config.model.vocab_size)) for name, modality in modalities.items())
        samples.append(Sample(SampleMeta(key=f"noise-{i}", group=str(i)), tuple(items)))
    if packed is not None:
        config, modalities = packed, build_modalities(packed.modalities, decoding=False)
    return pack(samples, eval_settings(config, modalities))


def held_out_batch(config: RunConfig) -> tuple[Batch, str] | None:
    """Samples of the run's held-out shards, else of its training shards; None where neither is here."""
    tokenizer = config.data.tokenizer
    if tokenizer is not None and not Path(tokenizer).is_file():
        return None
    modalities = build_modalities(config.modalities, tokenizer)
    for paths in (config.evaluate.test, tuple(source.path for source in config.data.train)):
        with contextlib.suppress(NoShards, StopIteration):
            batch, _ = next(iterate_eval(paths, config, modalities, 4 * SAMPLES))
            return batch, f"{len(batch.metas)} samples of {paths[0]}"
    return None


def largest_difference(old: MMMoE, new: MMMoE, batch: Batch, of_new: Batch | None = None) -> float:
    """Over features (absolute) and the targets' negative log-likelihoods (relative to max(1, nll)) that both have;
    over the trunk's output where the objectives read neither. ``of_new``: the same samples as ``new`` packs them."""
    with torch.inference_mode():
        (before, _), (after, _) = old(batch), new(batch if of_new is None else of_new)
    both = before.features.keys() & after.features.keys()
    differences = [(before.features[name] - after.features[name]).abs().max() for name in sorted(both)]
    for task, nll in before.token_nll.items():
        if nll.numel() and task in after.token_nll:
            differences.append(((nll - after.token_nll[task]).abs() / nll.clamp(min=1)).max())
    if not differences and before.hidden_nD.shape == after.hidden_nD.shape:
        differences.append((before.hidden_nD - after.hidden_nD).abs().max())
    largest = float(torch.stack(differences).max()) if differences else 0.0
    if not np.isfinite(largest):
        raise ValueError("the outputs are not finite, so that nothing can be compared; take an earlier checkpoint")
    return largest


@dataclass(frozen=True)
class Usage:
    """Share of each layer's assignments that each expert has (identity and null experts last), and
    where that is known from."""

    share: dict[int, np.ndarray]
    origin: str


def usage(run_dir: Path, step: int, model: MMMoE, batch: Batch, batch_name: str) -> Usage:
    """From the last logged steps up to ``step``; where there is no log of this model, from ``batch``."""
    with torch.inference_mode():
        counts = {stats.layer: stats.counts_ME.sum(0).double().numpy() for stats in model(batch)[1]}
    log = run_dir / "metrics.jsonl"
    logged = logged_usage(log, step, {layer: len(count) for layer, count in counts.items()})
    return logged or Usage({layer: count / max(1.0, count.sum()) for layer, count in counts.items()}, batch_name)


def logged_usage(log: Path, step: int, experts: dict[int, int]) -> Usage | None:
    """The usage in the last records of ``log`` up to ``step``; None if there are none, or they are of other
    ``experts`` (layer -> number). An incomplete last line is skipped. Raises ValueError that names the file."""
    try:
        records = [record for record in _records(log) if record["step"] <= step][-LOGGED_STEPS:]
        if not records or any(_experts(record) != experts for record in records):
            return None
        logged = {layer: np.zeros(count) for layer, count in experts.items()}
        for record in records:
            for layer in record["routing"]:
                for modality, count in layer["assignments"].items():
                    logged[layer["layer"]] += count * np.asarray(layer["load"][modality], dtype=np.float64)
        if not all(np.isfinite(count).all() and (count >= 0).all() for count in logged.values()):
            raise ValueError("shares of experts are not finite or negative")
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, OverflowError) as error:
        why = brief(f"{type(error).__name__}: {error}")
        raise ValueError(f"{log} is not a log of a run ({why}); fix the line or move the file away") from error
    origin = f"{log.name}, {len(records)} records of steps {records[0]['step']} to {records[-1]['step']}"
    return Usage({layer: count / max(1.0, count.sum()) for layer, count in logged.items()}, origin)


def _records(log: Path) -> list[dict[str, Any]]:
    lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
    return [parse_json(line, f"line {i}") for i, line in enumerate(lines, 1) if line.endswith(b"\n")]


def _experts(record: dict[str, Any]) -> dict[int, int]:
    return {layer["layer"]: len(next(iter(layer["load"].values()))) for layer in record["routing"]}
