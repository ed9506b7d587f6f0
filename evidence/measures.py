"""Measures of a run's routing at the end of training, from its record: metrics that are no held-out scores.

Names: ``routing/specialisation``, ``routing/largest_load``, ``routing/experts_used``, ``routing/dead`` and, by
modality, ``routing/dropped/MODALITY``. Shapes: E experts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmmoe_pretrain.evaluate import routing_report

ROUTING = "routing/"  # names begin so
Layers = Sequence[dict[str, Any]]  # of each MoE layer, by modality


@dataclass(frozen=True)
class Routing:
    """By MoE layer, as in a record. ``load`` and ``dropped`` are of the modalities that have tokens, or None."""

    specialisation: Sequence[float]
    largest_load: Sequence[float]
    load: Layers
    dropped: Layers


def measure(name: str, routing: Routing) -> float | None:
    """None where nothing is known, as of a dense model. Raises ValueError for an unknown name."""
    kind, _, modality = name.removeprefix(ROUTING).partition("/")
    if kind == "dropped":
        shares = [layer[modality] for layer in routing.dropped if layer.get(modality) is not None]
        return statistics.fmean(shares) if shares else None
    if kind not in MEASURES or modality:
        known = ", ".join(ROUTING + each for each in (*MEASURES, "dropped/MODALITY"))
        raise ValueError(f"there is no measure {name!r} of routing; there are {known}")
    return MEASURES[kind](routing) if routing.load else None


def _rows(layer: dict[str, Any]) -> dict[str, np.ndarray]:
    """The load [E] of each modality that has tokens."""
    return {name: np.array(row, dtype=float) for name, row in layer.items() if None not in row and sum(row) > 0}


def experts_used(routing: Routing) -> float:
    """Of a modality, mean of the layers; of the modality that uses fewest."""
    used: dict[str, list[float]] = {}
    for layer in routing.load:
        for name, load_E in _rows(layer).items():
            used.setdefault(name, []).append(float(routing_report.experts_used(load_E / load_E.sum())))
    return min(statistics.fmean(of_layers) for of_layers in used.values())


def dead(routing: Routing) -> float:
    """The share of experts that no modality uses, of all layers."""
    loads = [np.stack(list(_rows(layer).values())) for layer in routing.load]
    unused = sum(len(routing_report.dead_experts(load_ME)) for load_ME in loads)
    return unused / sum(load_ME.shape[1] for load_ME in loads)


MEASURES: dict[str, Callable[[Routing], float]] = {
    "specialisation": lambda routing: statistics.fmean(routing.specialisation),
    "largest_load": lambda routing: max(routing.largest_load),
    "experts_used": experts_used,
    "dead": dead,
}
