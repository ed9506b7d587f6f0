"""How routing changed in training, from the records of ``metrics.jsonl``.

Shapes: R records (logged steps), M modalities, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmmoe_pretrain.evaluate.routing_report import experts_used, specialisation
from mmmoe_pretrain.untrusted import brief, parse_json

MAX_POINTS = 120  # of a line; a point is the mean of its records beyond that
MAX_LOAD_STEPS = 40  # steps whose loads are kept
MAX_LOADS = 250_000  # numbers of all layers: a megabyte of the page


@dataclass(frozen=True)
class LayerHistory:
    """``load_RME``: share of the modality's assignments at each expert; NaN where a record has no token
    of the modality."""

    layer: int
    modalities: tuple[str, ...]
    steps_R: np.ndarray
    load_RME: np.ndarray

    @property
    def change_RM(self) -> np.ndarray:
        """[R - 1, M]: total variation distance between a record and the next, half the sum of the
        absolute differences: the share of the modality's assignments that moved to other experts."""
        return 0.5 * np.abs(np.diff(self.load_RME, axis=0)).sum(-1)

    @property
    def specialisation_R(self) -> np.ndarray:
        """Mutual information of modality and expert over the bits that name a modality; NaN where fewer
        than two modalities have tokens."""
        return np.array([specialisation(np.nan_to_num(load_ME)) for load_ME in self.load_RME], dtype=float)


def read(path: Path) -> list[LayerHistory]:
    """By layer; empty where there is no log, no MoE layer in it, or fewer than two records. An incomplete last line
    is skipped, and so are records with another number of experts or other modalities than the last one: those from
    before experts were added or removed."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    records = [_parse(line, path, number) for number, line in enumerate(lines, start=1)]
    if not records:
        return []
    try:
        layers = [_layer(records, entry["layer"]) for entry in records[-1]["routing"]]
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        why = brief(f"{type(error).__name__}: {error}")
        raise ValueError(f"{path} has invalid routing records ({why}); move the file away") from error
    return [layer for layer in layers if len(layer.steps_R) > 1]


def in_json(history: Sequence[LayerHistory]) -> list[dict[str, Any]]:
    """What the report keeps of each layer: lines by modality over all ``steps``, and the ``load`` by step, modality
    and expert at fewer ``load_steps``."""
    numbers = sum(layer.load_RME[0].size for layer in history)
    most = max(2, min(MAX_LOAD_STEPS, MAX_LOADS // max(1, numbers)))
    return [_layer_in_json(layer, most) for layer in history]


def _layer_in_json(layer: LayerHistory, load_steps: int) -> dict[str, Any]:
    steps, score = binned(layer.steps_R, layer.specialisation_R)
    change_RM = np.concatenate([np.full((1, len(layer.modalities)), np.nan), layer.change_RM])
    _, change = binned(layer.steps_R, change_RM)
    _, used = binned(layer.steps_R, experts_used(layer.load_RME))
    at, load = binned(layer.steps_R, layer.load_RME, load_steps)
    return {
        "layer": layer.layer,
        "modalities": list(layer.modalities),
        "steps": steps.tolist(),
        "specialisation": score.tolist(),
        "change": change.T.tolist(),
        "experts_used": used.T.tolist(),
        "load_steps": at.tolist(),
        "load": load.tolist(),
    }


def binned(steps_R: np.ndarray, values_R: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most ``most`` rows: the last step of each bin, and the mean of its values that are numbers."""
    if len(steps_R) <= most:
        return steps_R, values_R
    parts = np.array_split(np.arange(len(steps_R)), most)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean over NaN alone, which is NaN
        means = [np.nanmean(values_R[part], axis=0) for part in parts]
    return steps_R[[part[-1] for part in parts]], np.stack(means)


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = parse_json(line, "the line")
        return {"step": record["step"], "routing": record["routing"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}:{number} is not a record of a step ({type(error).__name__}); fix the line or move the file"
        ) from error


def _layer(records: list[dict[str, Any]], layer: int) -> LayerHistory:
    found = [(r["step"], entry) for r in records for entry in r["routing"] if entry["layer"] == layer]
    modalities = tuple(found[-1][1]["load"])
    loads = [(step, _load(entry, modalities)) for step, entry in found if entry["load"].keys() == set(modalities)]
    experts = loads[-1][1].shape[1]
    same = [(step, load_ME) for step, load_ME in loads if load_ME.shape[1] == experts]
    steps_R = np.array([step for step, _ in same])
    return LayerHistory(layer, modalities, steps_R, np.stack([load_ME for _, load_ME in same]))


def _load(entry: dict[str, Any], modalities: tuple[str, ...]) -> np.ndarray:
    load_ME = np.array([entry["load"][m] for m in modalities], dtype=float)
    absent_M = np.array([not entry["tokens"][m] for m in modalities])
    return np.where(absent_M[:, None], np.nan, load_ME)
