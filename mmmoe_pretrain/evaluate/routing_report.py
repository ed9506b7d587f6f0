"""Which experts serve which modality, from assignment counts.

Owns the statistics of a layer's [M, E] counts. All modalities have the same weight, so the score does not depend on
their numbers of tokens.

* specialisation: mutual information of modality and expert, I(M; E) = sum over m, e of
  p(m) p(e|m) log2(p(e|m) / p(e)) in bits, and its share of H(M), the bits that name a modality.
  0: all modalities use the experts equally; 1: the expert determines the modality.
* experts used: exp of the entropy of p(e|m), the number of experts an even use would need.
* dead: an expert that gets less than 1% of an even share of every modality's assignments.

Shapes: M modalities, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.moe.stats import RoutingStats

DEAD_SHARE = 0.01  # of an even share


def array(sums: Tensor) -> np.ndarray:
    """float64, on the host."""
    return sums.detach().double().cpu().numpy()


def summarise_layer(stats: RoutingStats, untrained: RoutingStats) -> dict[str, Any]:
    """One layer's numbers, ready for JSON, from its sums over held-out rows; a modality without tokens is omitted.

    ``untrained``: of the same model before its first step, on the same rows.
    """
    counts_ME = array(stats.counts_ME)
    seen = np.flatnonzero(counts_ME.sum(axis=1) > 0)
    chosen_M, tokens_M = counts_ME[seen].sum(axis=1), array(stats.tokens_M)[seen]
    share_ME = _share(counts_ME[seen])
    names = [stats.names.modalities[m] for m in seen]
    modality_bits = math.log2(len(seen)) if len(seen) > 1 else 0.0
    score = specialisation(counts_ME) or 0.0
    return {
        "layer": stats.layer,
        "specialisation_bits": score * modality_bits,
        "experts": counts_ME.shape[1],
        "modality_bits": modality_bits,
        "specialisation": score,
        "specialisation_untrained": specialisation(array(untrained.counts_ME)) or 0.0,
        "dead": dead_experts(share_ME),
        "tokens": _by_name(names, tokens_M),
        "share": {name: row.tolist() for name, row in zip(names, share_ME, strict=True)},
        "experts_used": _by_name(names, experts_used(share_ME)),
        "entropy_bits": _by_name(names, array(stats.entropy_M)[seen] / tokens_M / math.log(2)),
        "dropped": _by_name(names, array(stats.dropped_M)[seen] / chosen_M),
    }


def summarise_tasks(counts_MXE: np.ndarray, names: StreamNames) -> dict[str, dict[str, Any]]:
    """``share_by_task``: each expert's share of a task's assignments. ``specialisation_by_task``: specialisation over
    each task's tokens alone, where at least two modalities have some. ``task_specialisation``: by modality, how much
    of the task the expert determines: the mutual information of task and expert over the bits that name a task,
    where two tasks have tokens."""
    counts_XE = counts_MXE.sum(0)
    by_task = {task: specialisation(counts_MXE[:, x]) for x, task in enumerate(names.tasks)}
    by_modality = {name: specialisation(counts_MXE[m]) for m, name in enumerate(names.modalities)}
    return {
        "share_by_task": {
            task: (counts_XE[x] / counts_XE[x].sum()).tolist()
            for x, task in enumerate(names.tasks)
            if counts_XE[x].any()
        },
        "specialisation_by_task": {task: score for task, score in by_task.items() if score is not None},
        "task_specialisation": {name: score for name, score in by_modality.items() if score is not None},
    }


def strongest_pairs(together_EE: np.ndarray, tokens: float, limit: int) -> list[tuple[int, int, float]]:
    """Pairs of experts by the tokens that both served, the strongest first, as shares of ``tokens``."""
    share_EE = np.triu(together_EE, 1) / max(1.0, tokens)
    first = np.argsort(-share_EE, axis=None, kind="stable")[:limit]
    pairs = [divmod(int(cell), share_EE.shape[1]) for cell in first]
    return [(a, b, float(share_EE[a, b])) for a, b in pairs if share_EE[a, b] > 0]


def specialisation(counts_CE: np.ndarray) -> float | None:
    """The specialisation over classes C (modalities or tasks) of equal weight; None if fewer than two have tokens."""
    share_CE = _share(counts_CE[counts_CE.sum(1) > 0])
    if len(share_CE) < 2:
        return None
    nats = float(_entropy(share_CE.mean(axis=0)) - _entropy(share_CE).mean())
    return max(0.0, nats) / math.log(len(share_CE))


def experts_used(share: np.ndarray) -> np.ndarray:
    """The number of experts that an even use would need, over the last axis; NaN where a share is."""
    return np.exp(_entropy(share))


def dead_experts(share_ME: np.ndarray) -> list[int]:
    """Experts that no modality uses."""
    if len(share_ME) == 0:
        return []
    return np.flatnonzero(share_ME.max(axis=0) < DEAD_SHARE / share_ME.shape[1]).tolist()


def _share(counts_ME: np.ndarray) -> np.ndarray:
    return counts_ME / counts_ME.sum(axis=1, keepdims=True)


def _entropy(share: np.ndarray) -> np.ndarray:
    """Entropy in nats over the last axis, with 0 log 0 = 0."""
    return -(share * np.log(np.where(share == 0, 1.0, share))).sum(axis=-1)


def _by_name(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}
