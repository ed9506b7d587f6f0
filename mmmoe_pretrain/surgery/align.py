"""``mmmoe align``: joint heads by linear CCA (Hotelling 1936) of training samples, as the first weights of a
contrastive run, or to compare the modalities of a trunk that was trained without pairs.

The rows of a pair are the vectors that its two heads read. A head has no bias, so the fit is of rows without their
part in the direction of their mean, which makes the mean 0. The weights are the canonical directions, each times its
correlation (``cca.LinearCCA.embedded``). Several pairs share one space: if one head of a later pair is made, the
other is the ridge regression from its rows to the vectors of the first. Vectors get unit length behind a head, so its
scale is free; it keeps the norm of the weights that it replaces.

Shapes: N samples, W width of a head's input, P joint space, C canonical directions.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mmmoe_pretrain.batch import Batch, Sample
from mmmoe_pretrain.evaluate import cca
from mmmoe_pretrain.evaluate.features import HeldOut, collect
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.surgery.operation import Result, Source
from mmmoe_pretrain.surgery.parameters import fresh

BATCH_SIZE = 64
RIDGE = 1e-3  # of the mean variance: directions with less say little, and come out of few samples
HEADS = "mmmoe.joint_heads"


@dataclass(frozen=True)
class _Rows:
    """Of one representation: the vectors that its head reads, without a part in the direction of their mean."""

    without_NW: np.ndarray
    present_N: np.ndarray

    @classmethod
    def of(cls, data: HeldOut, name: str) -> _Rows:
        rows_NW, present_N = data.projected[name].astype(np.float64), np.array([*map(bool, data.content[name])])
        mean_W = rows_NW[present_N].mean(axis=0) if present_N.any() else np.zeros(rows_NW.shape[1])
        unit_W = mean_W / max(float(np.linalg.norm(mean_W)), np.finfo(np.float64).tiny)
        return cls(rows_NW - np.outer(rows_NW @ unit_W, unit_W), present_N)


def align(source: Source, samples: int) -> Result:
    """The joint heads of all aligned pairs, made of ``samples`` training samples. Raises ValueError where objectives
    align no pair, where the training shards cannot be read by number, and where a pair has too few samples."""
    pairs = source.model.objectives.aligned
    if not pairs:
        raise ValueError(
            f"no objective of {source.run_dir} brings two representations into one space; align a run with a "
            f"contrastive objective"
        )
    names = tuple(dict.fromkeys(itertools.chain.from_iterable(pairs)))
    data = _before_heads(source.model, source.training_batches(samples, BATCH_SIZE, "linear CCA"), names)
    rows = {name: _Rows.of(data, name) for name in names}
    maps: dict[str, np.ndarray] = {}  # [W, C]
    did, state, size = [], dict(source.state), source.config.model.embedding_size
    for first, second in pairs:
        did += _fit(rows, first, second, maps, size)
    for name, map_WC in maps.items():
        parameter = state[f"{HEADS}.{name}.weight"]
        weight_PW = _as_weight(map_WC, parameter.value.double().numpy())
        state[f"{HEADS}.{name}.weight"] = fresh(torch.from_numpy(weight_PW).float(), parameter.optimizer)
    read = [task for task, its in source.model.objectives.classifying.items() if its.representations[0] in maps]
    if read:
        did.append(f"the class heads of {', '.join(read)} stay as they are, and read other vectors now: train them")
    return Result(source.config, state, tuple(did), exact=False, allowed="as it is meant to")


def _fit(rows: dict[str, _Rows], first: str, second: str, maps: dict[str, np.ndarray], size: int) -> list[str]:
    """Add the maps of a pair to ``maps`` where they are not made yet; what was done. ``size``: of the joint space."""
    if first in maps and second in maps:
        return []
    if second in maps:
        first, second = second, first
    both_N = rows[first].present_N & rows[second].present_N
    x_NW, y_NW = rows[first].without_NW[both_N], rows[second].without_NW[both_N]
    width = max(x_NW.shape[1], y_NW.shape[1])
    if len(x_NW) <= width:
        raise ValueError(
            f"linear CCA of {first} and {second}: {len(x_NW)} of the {len(both_N)} training samples read have both, "
            f"and vectors of {width} numbers need more; raise --samples, or give the run data with such pairs"
        )
    if first in maps:
        target_NC = x_NW @ maps[first]
        square_WW = y_NW.T @ y_NW
        ridge = RIDGE * np.trace(square_WW) / len(square_WW)
        maps[second] = np.linalg.solve(square_WW + ridge * np.eye(len(square_WW)), y_NW.T @ target_NC)
        return [f"head of {second}: regression to {first} over {len(x_NW):,} training samples"]
    found = cca.fit(x_NW, y_NW, (RIDGE, RIDGE))
    kept = found.correlations_C[:size]
    maps[first] = found.first.map_PC[:, :size] * kept * len(x_NW) ** 0.5
    maps[second] = found.second.map_PC[:, :size] * kept * len(x_NW) ** 0.5
    return [
        f"heads of {first} and {second}: linear CCA of {len(x_NW):,} training samples, {len(kept)} directions with "
        f"correlations from {kept[0]:.2f} to {kept[-1]:.2f}"
    ]


def _as_weight(map_WC: np.ndarray, before_PW: np.ndarray) -> np.ndarray:
    """[P, W] of the norm of ``before_PW``. With fewer directions than P the other rows keep their weights, so that
    they can learn, at the length of the last direction."""
    weight_PW = before_PW.copy()
    directions = map_WC.shape[1]
    weight_PW[:directions] = map_WC.T
    rest_QW = weight_PW[directions:]
    if rest_QW.size:
        rest_QW *= np.linalg.norm(map_WC[:, -1]) / max(np.linalg.norm(rest_QW, axis=1).max(), np.finfo(float).tiny)
    return weight_PW * (np.linalg.norm(before_PW) / max(np.linalg.norm(weight_PW), np.finfo(float).tiny))


def _before_heads(model: MMMoE, batches: Iterator[tuple[Batch, list[Sample]]], names: tuple[str, ...]) -> HeldOut:
    """What the heads of ``names`` read."""
    heads, class_heads = {name: model.joint_heads[name] for name in names}, dict(model.class_heads.items())
    try:
        model.joint_heads.update({name: nn.Identity() for name in names})
        model.class_heads.update({task: nn.Identity() for task in class_heads})  # they would read other widths
        return collect(model, batches, names)
    finally:
        model.joint_heads.update(heads)
        model.class_heads.update(class_heads)
