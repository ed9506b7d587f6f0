"""Has every objective something to learn from? One whose loss is exactly 0 in every step has not.

Data that lacks a modality, or microbatches without negatives, would otherwise train to the end as if all were well.
Every rank decides alike, since the losses of a step and their counts are equal on all of them.
"""

from __future__ import annotations

from collections import Counter

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.objectives.counts import CAPTIONING, CONTRASTIVE, loss_weights

FIRST_STEPS = 10
FIRST_DRAWS = 10  # samples that an objective could have used, before a warning
HOPELESS_DRAWS = 1000  # before a run that learns nothing at all is ended


class Learning:
    """Counts from the first step of this process. ``add`` each step, then ask."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._steps = 0
        self._counts: Counter[str] = Counter()
        self._idle = [name for name, weight in loss_weights(config.objectives).items() if weight > 0]
        self._number = len(self._idle)
        self._warned: set[str] = set()

    def add(self, result: StepResult) -> list[str]:
        """Count a step; of the losses that were warned of, those that are not 0 for the first time."""
        self._steps += 1
        self._counts.update(result.counts.terms)
        found = [name for name in self._idle if result.losses[name] != 0]
        self._idle = [name for name in self._idle if name not in found]
        return [name for name in found if name in self._warned]

    def warnings(self) -> dict[str, str]:
        """By loss, why it has been 0 so far; each once, after the first steps."""
        if self._steps < FIRST_STEPS:
            return {}
        new = {name: why for name, why in self.idle().items() if name not in self._warned}
        self._warned |= set(new)
        return new

    def idle(self) -> dict[str, str]:
        """By loss, why it has been 0 in all steps, unless so few may be chance."""
        return {name: self._why(name) for name in self._idle if self._draws(name) >= FIRST_DRAWS}

    def refuse_nothing(self, whole_run: bool = False) -> None:
        """Raises ValueError where every objective has been idle for so long that the rest will be no better, or in a
        ``whole_run``."""
        patience = FIRST_DRAWS if whole_run else HOPELESS_DRAWS
        long = whole_run or self._steps >= FIRST_STEPS
        if long and len(self._idle) == self._number and all(self._draws(name) >= patience for name in self._idle):
            raise ValueError(f"there is nothing to learn: {'; '.join(self.idle().values())}")

    def _draws(self, name: str) -> float:
        """Samples that the objective was free to use."""
        share = self._config.objectives.captioning.fraction if name == CAPTIONING else 1.0
        return self._samples * share

    @property
    def _samples(self) -> int:
        return self._steps * self._config.train.global_batch_size

    def _why(self, name: str) -> str:
        so_far = f"in {self._steps} step{'s' * (self._steps != 1)} ({self._samples} samples)"
        if name == CAPTIONING:
            prefixes = " or ".join(self._config.objectives.captioning.prefixes)
            return (
                f"objectives.captioning had no target {so_far}: no sample drawn for it has text and {prefixes}. Give "
                f"the data such samples, or set objectives.captioning.weight: 0"
            )
        pair = name.removeprefix(CONTRASTIVE)
        if not self._counts[name]:
            return (
                f"objectives.contrastive had no sample with {pair.replace('-', ' and ')} {so_far}. Give the data "
                f"such samples, or take {pair} out of objectives.contrastive.pairs"
            )
        return (
            f"objectives.contrastive had no negatives for {pair} {so_far}: no sample with both met one of another "
            f"group in its global microbatch. Lower train.num_microbatches, raise train.global_batch_size, set "
            f"objectives.contrastive.cached: true, or see that not all samples of the data have the same group"
        )
