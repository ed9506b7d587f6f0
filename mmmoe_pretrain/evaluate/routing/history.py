"""How routing changed in training, from the records of ``metrics.jsonl``.

Shapes: R records (logged steps), M modalities, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmmoe_pretrain.evaluate.routing_report import specialisation
from mmmoe_pretrain.untrusted import brief, parse_json


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
