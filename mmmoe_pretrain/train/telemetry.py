"""The routing statistics in the log: rates by layer, expert, modality and task, from sums over tokens.

Computes rates from sums and writes them to ``metrics.jsonl``; ``moe/stats.py`` makes the sums. Shapes: M modalities,
X tasks, E experts (layers may differ in E).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.evaluate.routing_report import strongest_pairs
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.agreement import gather_objects
from mmmoe_pretrain.parallel.collectives import all_reduce_sum
from mmmoe_pretrain.parallel.groups import Group

# Of a RoutingStats, in the order of the fields of LayerRouting.
SUMS = (
    "tokens_MX",
    "counts_MXE",
    "probability_MXE",
    "entropy_MX",
    "dropped_MX",
    "coactivation_MEE",
    "combination_C3",
)
SIGNIFICANT_DIGITS = 6
SHARE_DIGITS = 4  # of numbers by expert, of which there are many
STRONGEST_PAIRS = 8  # of experts that serve tokens together, a modality; the matrix would be E^2 numbers


@dataclass(frozen=True)
class LayerRouting:
    """Sums over the tokens of all ranks in one MoE layer, and the rates that they give. A rate of
    a modality or task without tokens is 0."""

    layer: int
    names: StreamNames
    tokens_MX: np.ndarray
    counts_MXE: np.ndarray  # assignments, before any drop
    probability_MXE: np.ndarray
    entropy_MX: np.ndarray  # nats
    dropped_MX: np.ndarray  # assignments for which the expert was over capacity
    coactivation_MEE: np.ndarray  # tokens that both experts served
    combination_C3: np.ndarray | None = None  # as in RoutingStats
    lending: np.ndarray | None = None  # lending.Shares.summary

    @property
    def tokens_M(self) -> np.ndarray:
        return self.tokens_MX.sum(1)

    @property
    def load_ME(self) -> np.ndarray:
        """Share of the modality's assignments that each expert gets; rows sum to 1."""
        return _over(self.counts_MXE.sum(1), self.counts_MXE.sum((1, 2))[:, None])

    @property
    def seen_load_ME(self) -> np.ndarray:
        """``load_ME``, NaN for a modality without tokens."""
        return np.where(self.tokens_M[:, None] > 0, self.load_ME, np.nan)

    @property
    def mean_probability_ME(self) -> np.ndarray:
        """Mean over the modality's tokens of the router's distribution."""
        return _over(self.probability_MXE.sum(1), self.tokens_M[:, None])

    @property
    def entropy_M(self) -> np.ndarray:
        """Mean over tokens of the entropy of the router's distribution, nats."""
        return _over(self.entropy_MX.sum(1), self.tokens_M)

    @property
    def marginal_entropy_M(self) -> np.ndarray:
        """Entropy of the mean distribution, nats."""
        p_ME = self.mean_probability_ME
        return -(p_ME * np.log(np.where(p_ME > 0, p_ME, 1.0))).sum(1)

    @property
    def dropped_M(self) -> np.ndarray:
        """Share of the modality's assignments for which the expert was over capacity."""
        return _over(self.dropped_MX.sum(1), self.counts_MXE.sum((1, 2)))

    @property
    def load_over_even_E(self) -> np.ndarray:
        """Each expert's share of all assignments, times E: 1 is an even share, 0 a dead expert."""
        counts_E = self.counts_MXE.sum((0, 1))
        return counts_E.size * _over(counts_E, counts_E.sum())


def gather_routing(routing: Sequence[RoutingStats], group: Group) -> tuple[LayerRouting, ...]:
    """Numbers on the host, from the sums of a step. ``reduce_stats`` has reduced all of them except co-activation and
    lending, which are summed over ``group`` here, for all layers at once. Every rank must call it."""
    if not routing:
        return ()
    own = [_own_sums(stats) for stats in routing]
    sums = torch.cat([s.flatten().detach().double() for s in routing])
    host = torch.cat([sums, all_reduce_sum(torch.cat(own), group)]).cpu()  # one transfer
    parts = host.split([s.flatten().numel() for s in routing] + [part.numel() for part in own])
    layers = []
    for stats, part, rest in zip(routing, parts[: len(routing)], parts[len(routing) :], strict=True):
        pairs, lending = rest.split([stats.coactivation_MEE.numel(), rest.numel() - stats.coactivation_MEE.numel()])
        layer = dataclasses.replace(stats.unflatten(part), coactivation_MEE=pairs.view_as(stats.coactivation_MEE))
        made = LayerRouting(layer.layer, layer.names, *(getattr(layer, name).numpy() for name in SUMS))
        layers.append(dataclasses.replace(made, lending=lending.numpy() if len(lending) else None))
    return tuple(layers)


def _own_sums(stats: RoutingStats) -> Tensor:
    """Those that ``reduce_stats`` leaves to each rank."""
    own = (stats.coactivation_MEE,) if stats.lending is None else (stats.coactivation_MEE, stats.lending)
    return torch.cat([sums.detach().double().reshape(-1) for sums in own])


def gather_stages(layers: tuple[LayerRouting, ...], pipeline: Group) -> tuple[LayerRouting, ...]:
    """The layers of every pipeline stage in the order of the trunk; ``pipeline`` is a group on the host. Only at
    logged steps. Collective."""
    if pipeline is None:
        return layers
    stages = gather_objects(pipeline, layers)
    return tuple(sorted((layer for stage in stages for layer in stage), key=lambda layer: layer.layer))


def gather_balance(balance: Mapping[str, Tensor], pipeline: Group) -> dict[str, float]:
    """``StepResult.balance`` of every pipeline stage, on the host. Only at logged steps. Collective."""
    own = dict(zip(balance, torch.cat(list(balance.values())).tolist(), strict=True)) if balance else {}
    stages = [own] if pipeline is None else gather_objects(pipeline, own)
    return {name: value for stage in stages for name, value in stage.items()}


def layer_json(routing: LayerRouting) -> dict[str, Any]:
    """Plain values by name. Tasks hold only the modalities that have tokens, co-activation only the
    strongest pairs: ``[expert, expert, share of the modality's tokens]``."""
    seen, modalities = np.flatnonzero(routing.tokens_M).tolist(), routing.names.modalities

    def named(values_M: Iterable[float]) -> dict[str, float | None]:
        return {name: number(value) for name, value in zip(modalities, values_M, strict=True)}

    return {
        "layer": routing.layer,
        "tokens": named(routing.tokens_M),
        "assignments": named(routing.counts_MXE.sum((1, 2))),
        "load": {m: shares(row) for m, row in zip(modalities, routing.load_ME, strict=True)},
        "load_over_even": shares(routing.load_over_even_E),
        "mean_probability": {m: shares(row) for m, row in zip(modalities, routing.mean_probability_ME, strict=True)},
        "entropy": named(routing.entropy_M),
        "marginal_entropy": named(routing.marginal_entropy_M),
        "dropped": named(routing.dropped_M),
        "coactivation": {
            modalities[m]: [[a, b, number(share, SHARE_DIGITS)] for a, b, share in _pairs(routing, m)] for m in seen
        },
        **({} if routing.lending is None else {"lending": _lending(routing.lending)}),
        **({"combinations": _combinations(routing)} if routing.names.combinations else {}),
        "tasks": {
            task: {modalities[m]: _cell(routing, m, x) for m in np.flatnonzero(routing.tokens_MX[:, x]).tolist()}
            for x, task in enumerate(routing.names.tasks)
            if routing.tokens_MX[:, x].any()
        },
    }


def number(value: float, digits: int = SIGNIFICANT_DIGITS) -> float | None:
    """Rounded; None (null in JSON) where the value is not finite."""
    value = float(value)
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def shares(values_E: np.ndarray) -> list[float | None]:
    return [number(value, SHARE_DIGITS) for value in values_E.tolist()]


def _lending(sums_4: np.ndarray) -> dict[str, float | None]:
    """Rows of the fullest expert rank over the mean, without and with lending; and the experts that were lent in the
    step, of all its microbatches and expert groups."""
    without, lending, mean, lent = sums_4.tolist()
    even = max(mean, 1.0)
    return {"max_over_mean": number(without / even), "with_lending": number(lending / even), "experts": number(lent)}


def _combinations(routing: LayerRouting) -> dict[str, dict[str, float | None]]:
    """Of each combination of modalities that has tokens: their number, and the share whose first choice is its
    expert."""
    assert routing.combination_C3 is not None
    rows = zip(routing.names.combinations, routing.combination_C3.tolist(), strict=True)
    return {
        "-".join(its): {"tokens": number(tokens), "to_its_expert": number(first / tokens, SHARE_DIGITS)}
        for its, (_, tokens, first) in rows
        if tokens
    }


def _pairs(routing: LayerRouting, modality: int) -> list[tuple[int, int, float]]:
    return strongest_pairs(routing.coactivation_MEE[modality], routing.tokens_M[modality], STRONGEST_PAIRS)


def _cell(routing: LayerRouting, modality: int, task: int) -> dict[str, Any]:
    tokens, counts_E = routing.tokens_MX[modality, task], routing.counts_MXE[modality, task]
    return {
        "tokens": number(tokens),
        "load": shares(_over(counts_E, counts_E.sum())),
        "mean_probability": shares(routing.probability_MXE[modality, task] / tokens),
        "entropy": number(routing.entropy_MX[modality, task] / tokens),
        "dropped": number(float(_over(routing.dropped_MX[modality, task], counts_E.sum()))),
    }


def _over(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """``sums / counts``, with 0 where nothing was counted."""
    return sums / np.maximum(counts, 1.0)
