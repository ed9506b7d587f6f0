"""Distillation from the run before (learning without forgetting, arXiv 1606.09282): the new model should have the
vectors that the old one has for the samples of now. So what was learned is kept without its data.

The teacher is the average of the weights: with ``optimizer.average: 1.0`` it stays what the run began with, and
``mmmoe extend`` begins with the weights of the run before. With less it follows slowly. The loss of a sample is
1 - cos of the two vectors, half the squared distance of unit vectors, where the paper compares class probabilities.
It is of each sample alone, so of no layout or cut.

Shapes: B samples of a microbatch, R representations, P joint space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from torch import Tensor

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config.base import ModalitySettings, Names
from mmmoe_pretrain.kinds import nearest
from mmmoe_pretrain.objectives.base import ObjectiveModule, Outputs
from mmmoe_pretrain.objectives.pooled import PooledObjective, PooledSettings, present, stacked
from mmmoe_pretrain.parallel.groups import Groups


class DistillationSettings(PooledSettings):
    """``representations``: those whose vectors are kept (a modality is one)."""

    kind: Literal["distillation"] = "distillation"
    representations: Names = Field(min_length=1)

    @property
    def named(self) -> tuple[str, ...]:
        """See ``PooledSettings.named``."""
        return self.representations

    @property
    def taught(self) -> bool:
        """See ``ObjectiveSettings.taught``."""
        return True

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """See ``ObjectiveSettings.check_names``."""
        if unknown := [each for each in self.representations if each not in representations]:
            known = nearest(unknown[0], representations, "there are")
            raise ValueError(f"objectives.{name}.representations: there is no {unknown[0]}; {known}")


class Distillation(PooledObjective):
    """See the module."""

    Settings = DistillationSettings

    @property
    def losses(self) -> dict[str, float]:
        return {f"{self.name}/{rep}": 1.0 for rep in self.representations}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {f"{self.name}/{rep}": int((batch.pooled[rep] >= 0).sum()) for rep in self.representations}

    def needs(self) -> dict[str, set[str]]:
        return {what: way for rep in self.representations for what, way in self.ways(rep, (rep,)).items()}

    def module(self, embedding_size: int) -> ObjectiveModule:
        return _Student(self)


class _Student(ObjectiveModule):
    """Keeps the teacher's vectors of a step's microbatches until their own pass."""

    def __init__(self, objective: Distillation) -> None:
        super().__init__()
        self.name, self.sides = objective.name, objective.representations
        self._taught: list[Tensor] = []  # [B, R, P]

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        """See ``ObjectiveModule``."""
        rows_BRP = stacked(outputs.features, self.sides)
        # Without a teacher's pass, as in a plan of memory, the student stands for it.
        teacher_BRP = self._taught.pop(0) if self._taught else rows_BRP.detach()
        distance_BR = (1 - (rows_BRP * teacher_BRP).sum(dim=-1)) * present(batch, self.sides)
        return {f"{self.name}/{rep}": distance_BR[:, r].sum() for r, rep in enumerate(self.sides)}

    def teach(self, outputs: Outputs, batch: Batch, groups: Groups) -> None:
        """See ``ObjectiveModule.teach``."""
        self._taught.append(stacked(outputs.features, self.sides))

    def after_step(self, committed: bool) -> None:
        """The next step begins as a new one."""
        self._taught = []
