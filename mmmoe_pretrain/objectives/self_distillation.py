"""Self-distillation without labels (DINO, arXiv 2104.14294): a student learns to say of one representation of a
sample what a teacher says of another one. The teacher is the model itself with the average of its weights.

Both answer with a distribution over prototypes, learned unit vectors: the softmax of the cosines over a temperature.
The teacher's is sharper, and centred: the mean of its logits in earlier steps is subtracted first. Without these two
the same answer for all samples would be a minimum. The loss of a pair a-b is the mean of two cross-entropies: of the
teacher's b with the student's a, and of the teacher's a with the student's b.

Pairs are of two views of one modality, as in DINO, or of two modalities, each of which then teaches the other. A loss
is the mean over the samples of the step that have both sides.

Shapes: B samples of a microbatch, R representations, P joint space, K prototypes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.objectives.base import ObjectiveModule, Outputs
from mmmoe_pretrain.objectives.pooled import PairwiseObjective, PairwiseSettings, present, stacked
from mmmoe_pretrain.parallel.collectives import group_size
from mmmoe_pretrain.parallel.groups import Groups


class SelfDistillationSettings(PairwiseSettings):
    """``center_momentum``: the share of itself that the centre keeps in a step."""

    kind: Literal["self_distillation"] = "self_distillation"
    prototypes: int = Field(256, ge=2)
    student_temperature: float = Field(0.1, gt=0)
    teacher_temperature: float = Field(0.04, gt=0)
    center_momentum: float = Field(0.9, ge=0, lt=1)

    @property
    def taught(self) -> bool:
        """See ``ObjectiveSettings.taught``."""
        return True


class SelfDistillation(PairwiseObjective):
    """See the module."""

    Settings = SelfDistillationSettings

    def module(self, embedding_size: int) -> ObjectiveModule:
        return _Student(self, embedding_size)

    def flops(self, embedding_size: int, samples: float) -> float:
        return len(self.representations) * 2 * embedding_size * self.settings.prototypes


class _Student(ObjectiveModule):
    """The prototypes, which have their average with the teacher, and the centre of the teacher's logits."""

    center: Tensor  # [R, K]

    def __init__(self, objective: SelfDistillation, embedding_size: int) -> None:
        super().__init__()
        self.name, self.sides, self.pairs = objective.name, objective.representations, objective.pairs
        self.settings: SelfDistillationSettings = objective.settings
        self.prototypes = nn.Parameter(torch.empty(self.settings.prototypes, embedding_size))
        self.register_buffer("center", torch.zeros(len(self.sides), self.settings.prototypes))
        self._taught: list[Tensor] = []  # [B, R, K]: the teacher's probabilities, of the microbatches to come
        self._sums: list[Tensor] = []  # [R, K + 1]: of its logits over the samples of all ranks, and their number

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        """The sums of the cross-entropies in nats over this rank's samples, by pair."""
        logits_BRK = self._logits(outputs)
        log_student_BRK = F.log_softmax(logits_BRK / self.settings.student_temperature, dim=-1)
        # Without a teacher's pass, as in a plan of memory, the student stands for it.
        teacher_BRK = self._taught.pop(0) if self._taught else self._teacher(logits_BRK.detach())
        present_BR = present(batch, self.sides)
        sums = {}
        for pair, (a, b) in self.pairs.items():
            one, other = self.sides.index(a), self.sides.index(b)
            both_B = present_BR[:, one] & present_BR[:, other]
            ways = ((one, other), (other, one))
            there, back = (-(teacher_BRK[:, t] * log_student_BRK[:, s]).sum(dim=-1) for s, t in ways)
            sums[f"{self.name}/{pair}"] = 0.5 * ((there + back) * both_B).sum()
        return sums

    def teach(self, outputs: Outputs, batch: Batch, groups: Groups) -> None:
        """See ``ObjectiveModule.teach``."""
        logits_BRK, present_BR = self._logits(outputs), present(batch, self.sides)
        self._taught.append(self._teacher(logits_BRK))
        present_BR1 = present_BR[..., None].to(logits_BRK.dtype)
        sums_RK1 = torch.cat([logits_BRK * present_BR1, present_BR1], dim=-1).sum(dim=0)
        if group_size(groups.data) > 1:
            dist.all_reduce(sums_RK1, group=groups.data)
        self._sums.append(sums_RK1)

    def _logits(self, outputs: Outputs) -> Tensor:
        return stacked(outputs.features, self.sides) @ F.normalize(self.prototypes.float(), dim=-1).t()

    def _teacher(self, logits_BRK: Tensor) -> Tensor:
        return ((logits_BRK - self.center) / self.settings.teacher_temperature).softmax(dim=-1)

    def after_step(self, committed: bool) -> None:
        """The centre follows the teacher's mean logits over the samples of the step."""
        sums, self._sums, self._taught = self._sums, [], []
        if not (committed and sums):
            return
        total_RK1 = torch.stack(sums).sum(dim=0)
        count_R1 = total_RK1[:, -1:]
        mean_RK = total_RK1[:, :-1] / count_R1.clamp(min=1)
        moved_RK = torch.lerp(mean_RK, self.center, self.settings.center_momentum)
        self.center.copy_(torch.where(count_R1 > 0, moved_RK, self.center))
