"""Idle objectives: objectives whose loss is exactly 0 in every step in which it has a weight. They show data without
a modality, or microbatches without negatives, early in the run. All ranks decide equally, since the losses of a step
and their counts are equal on all of them.
"""

from __future__ import annotations

from collections import Counter

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.objectives import Objective, objectives_of

FIRST_STEPS = 10
FIRST_DRAWS = 10  # samples that an objective could have used, before a warning
MAX_IDLE_DRAWS = 1000  # before a run in which every objective is idle is ended


class ObjectiveMonitor:
    """Counts from the first step of this process: ``add`` each step."""

    def __init__(self, config: RunConfig) -> None:
        self._config, self._objectives = config, objectives_of(config)
        self._weighed: Counter[str] = Counter()  # steps in which a loss had a weight
        self._counts: Counter[str] = Counter()
        losses = self._objectives.losses.items()
        self._idle = [loss for loss, name in losses if self._objectives[name].losses[loss] > 0]
        self._number = len(self._idle)
        self._warned: set[str] = set()

    def add(self, step: int, result: StepResult) -> list[str]:
        """Count ``step`` (from 0). Returns the losses with a warning that are nonzero for the first time."""
        weighed = [loss for loss, weight in self._objectives.weights(step).items() if weight > 0]
        self._weighed.update(weighed)
        self._counts.update({loss: result.counts.terms[loss] for loss in weighed})
        found = [name for name in self._idle if result.losses[name] != 0]
        self._idle = [name for name in self._idle if name not in found]
        return [name for name in found if name in self._warned]

    def warnings(self) -> dict[str, str]:
        """The reasons, by loss, why it has been 0 so far; each once, after the first steps in which it has a
        weight."""
        new = {
            name: why
            for name, why in self.idle().items()
            if name not in self._warned and self._weighed[name] >= FIRST_STEPS
        }
        self._warned |= set(new)
        return new

    def idle(self) -> dict[str, str]:
        """The reasons, by loss, why it has been 0 in all steps, unless so few may be chance."""
        return {name: self._why(name) for name in self._idle if self._draws(name) >= FIRST_DRAWS}

    def raise_if_all_idle(self, whole_run: bool = False) -> None:
        """Raises ValueError where every objective has been idle for long, or in a ``whole_run``."""
        draws, steps = (FIRST_DRAWS, 1) if whole_run else (MAX_IDLE_DRAWS, FIRST_STEPS)
        long = all(self._weighed[name] >= steps and self._draws(name) >= draws for name in self._idle)
        if long and len(self._idle) == self._number:
            raise ValueError(f"there is nothing to learn: {'; '.join(self.idle().values())}")

    def _draws(self, loss: str) -> float:
        """Samples that the loss was free to use."""
        return self._samples(loss) * self._objective(loss).share(loss)

    def _samples(self, loss: str) -> int:
        return self._weighed[loss] * self._config.train.global_batch_size

    def _why(self, loss: str) -> str:
        steps = self._weighed[loss]
        so_far = f"in {steps} step{'s' * (steps != 1)} ({self._samples(loss)} samples)"
        return self._objective(loss).why_idle(loss, self._counts[loss], so_far)

    def _objective(self, loss: str) -> Objective:
        return self._objectives[self._objectives.losses[loss]]
