"""Adaptation to a domain by an adversary (DANN, arXiv 1505.07818): a classifier of one hidden layer learns to tell
the domains apart, and the gradient that it gives the vectors is reversed, so that they learn to be alike.

The loss is the mean of its cross-entropy over the samples of the source, and that over those of the target: with both
at log 2 = 0.693 it cannot tell them apart.

Shapes: B samples of a microbatch, P joint space.
"""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config.schedule import Weight, check_schedule, schedule_of, value_at
from mmmoe_pretrain.objectives.base import ObjectiveModule, Outputs
from mmmoe_pretrain.objectives.domains import DOMAINS, DomainObjective, DomainSettings, scaled
from mmmoe_pretrain.parallel.groups import Groups


class AdversarialSettings(DomainSettings):
    """``reversal``: what the reversed gradient is multiplied by: a number, or [[step, number], ...] with straight
    lines between (in the paper it rises from 0 to 1). ``classifier_size``: of its hidden layer."""

    kind: Literal["domain_adversarial"] = "domain_adversarial"
    reversal: Weight = 1.0
    classifier_size: int = Field(128, ge=1, le=1 << 16)

    @model_validator(mode="after")
    def _rising(self) -> Self:
        check_schedule(schedule_of(self.reversal), "reversal")
        return self


class DomainAdversarial(DomainObjective):
    """See the module."""

    Settings = AdversarialSettings

    @property
    def losses(self) -> dict[str, float]:
        return {f"{self.name}/{domain}": 1.0 for domain in DOMAINS}

    def counts(self, batch: Batch) -> dict[str, int]:
        return dict(zip(self.losses, self.of_domains(batch).sum(0).tolist(), strict=True))

    def module(self, embedding_size: int) -> ObjectiveModule:
        return _Classifier(self, embedding_size)

    def flops(self, embedding_size: int, samples: float) -> float:
        return 2 * (embedding_size + 1) * self.settings.classifier_size


class _Classifier(ObjectiveModule):
    def __init__(self, objective: DomainAdversarial, embedding_size: int) -> None:
        super().__init__()
        self.objective, self._strength = objective, 1.0
        self.hidden = nn.Linear(embedding_size, objective.settings.classifier_size)
        self.out = nn.Linear(objective.settings.classifier_size, 1)

    def begin_step(self, step: int) -> None:
        """See ``ObjectiveModule.begin_step``."""
        self._strength = value_at(schedule_of(self.objective.settings.reversal), step)

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        """The cross-entropy of each domain, summed over this rank's samples of it."""
        x_BP = _Reversed.apply(scaled(outputs.features[self.objective.settings.of]), self._strength)
        logit_B = self.out(F.relu(self.hidden(x_BP))).squeeze(1)
        nll_B2 = torch.stack([F.softplus(logit_B), F.softplus(-logit_B)], dim=1)  # the logit is of the target
        sums = (nll_B2 * self.objective.of_domains(batch)).sum(0)
        return dict(zip(self.objective.losses, sums, strict=True))


class _Reversed(torch.autograd.Function):
    """The same values; the gradient is multiplied by -``strength``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.strength * grad, None
