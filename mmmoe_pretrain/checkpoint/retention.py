"""Which checkpoints may go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmmoe_pretrain.checkpoint.names import Checkpoint


@dataclass(frozen=True)
class Retention:
    """What stays: the ``last`` ones, those at multiples of ``every`` steps, and the ``best`` by metric."""

    last: int = 2
    every: int = 0  # steps; 0: none
    best: int = 0


def to_delete(
    checkpoints: Sequence[Checkpoint], metrics: Mapping[int, float | None], retention: Retention
) -> list[Checkpoint]:
    """Of complete checkpoints, those that nothing keeps, oldest first. The newest is always kept.

    ``metrics`` are by step, the lower the better; one without a finite metric is never among the best, and of
    equals the later is better.
    """
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.step)
    kept = {c.step for c in ordered[-max(1, retention.last) :]}
    if retention.every:
        kept |= {c.step for c in ordered if c.step % retention.every == 0}
    known = [
        (metric, -c.step) for c in ordered if (metric := metrics.get(c.step)) is not None and math.isfinite(metric)
    ]
    kept |= {-step for _, step in sorted(known)[: retention.best]}
    return [c for c in ordered if c.step not in kept]
