"""Scores of objectives that generate modalities from latent numbers (``Objective.generates``), on held-out rows.

Of an objective NAME:

* ``NAME_elbo`` and ``NAME_importance``: lower bounds of the log-likelihood of all modalities of a row, in nats: the
  evidence bound, and the importance-weighted one of ``evaluate.latents.draws`` draws (IWAE, arXiv 1509.00519).
* ``NAME_image_given_text``: the log-likelihood of a row's image given its text alone, by draws of the posterior of
  the text. Chance: by draws of the prior. From the modality itself it is a reconstruction.
* ``NAME_image_given_text_to_image_r1``: coherence. The image that is generated from the text (the mean, at the mean
  of the posterior) goes through the trunk; its vector finds the row's image among those of all rows. So it is judged
  by the run's own features.

With a condition the sources are the condition alone, too (``NAME_image_given_language``).

Shapes: N rows, P the joint space, L latent numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmmoe_pretrain.batch import Batch, Item, Sample
from mmmoe_pretrain.checkpoint import trained_module
from mmmoe_pretrain.config import EvaluateConfig
from mmmoe_pretrain.data.evaluation import eval_settings
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.evaluate import retrieval
from mmmoe_pretrain.evaluate.features import HeldOut, device_of, taken
from mmmoe_pretrain.evaluate.rows import HeldOutRows
from mmmoe_pretrain.evaluate.scores import Score, Scored, retrieval_scores
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.objectives import Objective
from mmmoe_pretrain.objectives.base import GenerativeModule

SHOWN = ("_r1", "_r10")


@dataclass(frozen=True)
class Way:
    """``target`` from the modalities ``seen``; ``source``: what they are called."""

    target: str
    source: str
    seen: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.target}_given_{self.source}"


def ways_of(objective: Objective) -> list[Way]:
    """Each modality from each, and from the condition alone."""
    told = objective.reconstructs_given
    sources = [(name, (name,)) for name in objective.reconstructs] + ([(told, ())] if told else [])
    return [Way(target, source, seen) for target in objective.reconstructs for source, seen in sources]


def generative_module(run_dir: Path, rows: HeldOutRows, objective: Objective, model: MMMoE) -> GenerativeModule:
    """With the weights of the run."""
    module = trained_module(run_dir, rows.config, objective)
    assert isinstance(module, GenerativeModule), objective.name
    return module.to(device_of(model)).eval()


def scores_of(data: HeldOut, model: MMMoE, rows: HeldOutRows, run_dir: Path) -> list[Scored]:
    """Of every such objective. ``data``: of all rows."""
    found = []
    for objective in model.objectives.values():
        if objective.reconstructs:
            module = generative_module(run_dir, rows, objective, model)
            with torch.inference_mode():
                found.append(_scores(objective, module, data, model, rows))
    return found


def _scores(objective: Objective, module: GenerativeModule, data: HeldOut, model: MMMoE, rows: HeldOutRows) -> Scored:
    settings, name = rows.config.evaluate, objective.name
    numbers_N, nats, vectors = _pass(objective, module, data, model, rows)
    chosen = taken(data, numbers_N)
    made: list[Score] = []
    for what, values_N in nats.items():
        if what.startswith("prior/"):
            continue
        of_prior = nats.get(f"prior/{what.partition('_given_')[0]}")
        made += _mean(f"{name}_{what}", values_N, None if of_prior is None else np.nanmean(of_prior))
    for way in ways_of(objective):
        made += _coherence(f"{name}_{way.name}", way, vectors[way.name], chosen, settings)
    if not made:
        return [], [f"no held-out row has {' or '.join(objective.reconstructs)}: no score of {name}"]
    return made, [
        f"{name}: bounds and likelihoods are in nats a row, of {settings.latents.draws} draws, over "
        f"{len(numbers_N):,} rows; what is generated is judged by this run's own features"
    ]


def _pass(
    objective: Objective, module: GenerativeModule, data: HeldOut, model: MMMoE, rows: HeldOutRows
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The numbers of the rows that are scored; by name their nats, NaN where one has none; and by way the vectors of
    what is generated, zero where there is none."""
    numbers: list[int] = []
    nats, vectors = defaultdict[str, list[np.ndarray]](list), defaultdict[str, list[np.ndarray]](list)
    settings, draws = eval_settings(rows.config, rows.modalities), rows.config.evaluate.latents.draws
    for first, samples, positions in _spread(rows, len(data.metas)):
        batch = pack(samples, settings, positions).to(device_of(model))
        features = model(batch)[0].features
        generator = torch.Generator().manual_seed(rows.config.seed * 1_000_003 + positions[0])
        elbo, importance, here = module.bounds(features, batch, draws, generator)
        nats["elbo"].append(_masked(elbo, here))
        nats["importance"].append(_masked(importance, here))
        for target in objective.reconstructs if not objective.reconstructs_given else ():
            of_prior = module.likelihood_given(target, (), features, batch, draws, generator)
            nats[f"prior/{target}"].append(_masked(*of_prior))
        for way in ways_of(objective):
            value, here = module.likelihood_given(way.target, way.seen, features, batch, draws, generator)
            nats[way.name].append(_masked(value, here))
            z_BL = module.latent(way.seen, features, batch)
            made = values_of(module, rows.modalities[way.target], z_BL, features, batch, samples)
            vectors[way.name].append(_vectors(model, settings, way.target, made, samples, positions) * _column(here))
        numbers += first
    joined = ({name: np.concatenate(parts) for name, parts in its.items()} for its in (nats, vectors))
    of_nats, of_vectors = joined
    return np.asarray(numbers, dtype=np.int64), of_nats, of_vectors


def _spread(rows: HeldOutRows, total: int) -> Iterator[tuple[list[int], list[Sample], list[int]]]:
    """At most ``evaluate.latents.rows`` of ``total`` rows, by batch: their numbers, samples and positions."""
    step, number = math.ceil(total / rows.config.evaluate.latents.rows), 0
    for samples, positions in rows.samples():
        kept = [i for i in range(len(samples)) if (number + i) % step == 0]
        if kept:
            yield [number + i for i in kept], [samples[i] for i in kept], [positions[i] for i in kept]
        number += len(samples)


def values_of(
    module: GenerativeModule,
    modality: Modality,
    z_BL: Tensor,
    features: dict[str, Tensor],
    batch: Batch,
    samples: Sequence[Sample],
) -> list[np.ndarray]:
    """What is generated for each sample. It is as long as the sample's own item, of one without any as long as can
    be; a text ends where the model ends it."""
    own = [sample.first(modality.name) for sample in samples]
    most = modality.max_tokens - int(modality.predictable)
    lengths = [most if modality.predictable or item is None else modality.num_tokens(item.value) for item in own]
    contents = module.generate(modality.name, z_BL, features, batch, lengths)
    return [modality.rebuilt(content.float().cpu().numpy().astype(_kind(modality))) for content in contents]


def _kind(modality: Modality) -> type:
    return np.int64 if modality.predictable else np.float32


def _vectors(
    model: MMMoE,
    settings: PackSettings,
    target: str,
    values: Sequence[np.ndarray],
    samples: Sequence[Sample],
    positions: Sequence[int],
) -> np.ndarray:
    """[B, P]: of these values of modality ``target``, by the model."""
    alone = [replace(sample, items=(Item(target, value),)) for sample, value in zip(samples, values, strict=True)]
    outputs, _ = model(pack(alone, settings, positions).to(device_of(model)))
    found: np.ndarray = outputs.features[target].float().cpu().numpy()
    return found


def _masked(value_B: Tensor, here_B: Tensor) -> np.ndarray:
    value, here = value_B.double().cpu().numpy(), here_B.cpu().numpy()
    return np.where(here, value, np.nan)


def _column(here_B: Tensor) -> np.ndarray:
    return here_B.cpu().numpy()[:, None]


def _mean(metric: str, values_N: np.ndarray, chance: float | None) -> list[Score]:
    """Of the rows that have a value."""
    found = values_N[~np.isnan(values_N)]
    if not len(found):
        return []
    value, half = (
        float(found.mean()),
        retrieval.Z95 * float(found.std(ddof=min(1, len(found) - 1))) / len(found) ** 0.5,
    )
    of_chance = None if chance is None else float(chance)
    return [Score(metric, value, of_chance, None, len(found), (value - half, value + half), None, "nats")]


def _coherence(name: str, way: Way, vectors_NP: np.ndarray, data: HeldOut, settings: EvaluateConfig) -> list[Score]:
    """Retrieval of each row's own item of the target by what was generated in its place. A query is a distinct
    content of source and target together."""
    sides = sorted({way.target, *way.seen})
    contents = zip(*(data.content[side] for side in sides), strict=True)
    here = np.asarray(vectors_NP.any(axis=1)).tolist()
    content = tuple(" ".join(parts) if has and all(parts) else "" for has, parts in zip(here, contents, strict=True))
    if not any(content):
        return []
    shown = replace(data, features={**data.features, name: vectors_NP}, content={**data.content, name: content})
    found, _ = retrieval_scores(shown, (name, way.target), settings.model_copy(update={"rows": {}}), ways=((0, 1),))
    return [score for score in found if score.metric.endswith(SHOWN)]
