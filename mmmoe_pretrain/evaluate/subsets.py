"""Retrieval by representations of several modalities of which some are absent: ``evaluate.subsets``.

Of each such representation whose parts may be missing, and of each set of its parts, the recall of its pairs where a
sample has these parts alone, as ``scene[image]_to_text_r10``. The rows are those that have all of its parts; the
model runs once more over them for each set of modalities that is withheld, and sees all else of a sample.
``scene[image,audio]``, with all parts, is of the same rows. Rows that differ in what is withheld are one query.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mmmoe_pretrain.batch import Sample
from mmmoe_pretrain.config import EvaluateConfig
from mmmoe_pretrain.config.base import sides_of
from mmmoe_pretrain.data.evaluation import eval_settings
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.evaluate import scores
from mmmoe_pretrain.evaluate.features import HeldOut, content_name, device_of
from mmmoe_pretrain.evaluate.rows import HeldOutRows
from mmmoe_pretrain.evaluate.scores import Pair, Scored
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.objectives import Objectives, Representation

Parts = tuple[str, ...]
Seen = tuple[np.ndarray, tuple[str, ...]]  # features [N, P], and names of contents, "" where a row is left out


def scores_of(data: HeldOut, model: MMMoE, rows: HeldOutRows) -> list[Scored]:
    """Of every representation and set of its parts, where ``evaluate.subsets``. ``data``: of the same rows."""
    if not rows.config.evaluate.subsets:
        return []
    by_withheld: dict[frozenset[str], list[tuple[Representation, Parts]]] = defaultdict(list)
    for rep in representations(model.objectives):
        for parts in subsets(rep.modalities):
            by_withheld[frozenset(rep.modalities) - {*parts}].append((rep, parts))
    found = []
    for withheld, wanted in by_withheld.items():
        for (rep, parts), seen in zip(wanted, _seen(data, model, rows, withheld, wanted), strict=True):
            pairs = [pair for pair in model.objectives.aligned if rep.name in pair]
            found += [of_subset(data, seen, pair, rep.name, parts, rows.config.evaluate) for pair in pairs]
    return found


def representations(objectives: Objectives) -> list[Representation]:
    """Those of several parts that a sample may lack, in a pair of ``Objectives.aligned``."""
    in_pairs = {name for pair in objectives.aligned for name in pair}
    every = objectives.representations.values()
    return [rep for rep in every if rep.name in in_pairs and len(rep.modalities) > 1 and len(rep.ways) > 1]


def subsets(parts: Parts) -> Iterator[Parts]:
    """Of one part and more."""
    return itertools.chain.from_iterable(itertools.combinations(parts, size + 1) for size in range(len(parts)))


def of_subset(data: HeldOut, seen: Seen, pair: Pair, name: str, parts: Parts, settings: EvaluateConfig) -> Scored:
    """Retrieval between the representation ``name`` of these parts, which is ``seen``, and the other of ``pair``."""
    shown = f"{name}[{','.join(parts)}]"
    features, content = seen
    rows = {key: its for key, its in settings.rows.items() if {*sides_of(key)} == {*pair}}
    first, second = (shown if side == name else side for side in pair)
    return scores.retrieval_scores(
        dataclasses.replace(
            data, features={**data.features, shown: features}, content={**data.content, shown: content}
        ),
        (first, second),
        settings.model_copy(update={"rows": {f"{first}-{second}": its for its in rows.values()}}),
    )


def _seen(
    data: HeldOut,
    model: MMMoE,
    rows: HeldOutRows,
    withheld: frozenset[str],
    wanted: Sequence[tuple[Representation, Parts]],
) -> list[Seen]:
    """What a pass without the modalities ``withheld`` gives for each of ``wanted``."""
    settings, device = eval_settings(rows.config, rows.modalities), device_of(model)
    kept = rows.modalities.keys() - withheld
    features: dict[str, list[np.ndarray]] = defaultdict(list)
    content: list[list[str]] = [[] for _ in wanted]
    for samples, positions in rows.samples():
        for (rep, parts), names in zip(wanted, content, strict=True):
            names += [_content(sample, rep, parts) for sample in samples]
        if withheld:
            left = [sample.only(kept) for sample in samples]
            with torch.inference_mode():
                outputs, _ = model(pack(left, settings, positions).to(device))
            for rep, _ in wanted:
                features[rep.name].append(outputs.features[rep.name].float().cpu().numpy())
    of_all = {name: np.concatenate(batches) for name, batches in features.items()} if withheld else data.features
    return [(of_all[rep.name], tuple(names)) for (rep, _), names in zip(wanted, content, strict=True)]


def _content(sample: Sample, rep: Representation, parts: Parts) -> str:
    items = {name: sample.first(name) for name in rep.modalities}
    return "" if None in items.values() else " ".join(content_name(item) for name in parts if (item := items[name]))
