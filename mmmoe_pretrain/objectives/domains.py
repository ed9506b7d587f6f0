"""Adaptation to a shifted domain: the vectors of a target domain, which has no pairs to train on, become like those
of the source.

The domain of a sample is in a field of its JSON. Features are unit vectors times sqrt(P), whose numbers have a mean
square of 1.

``moment_alignment`` (Deep CORAL, arXiv 1607.01719, with the means, too): the loss of a scope, a global microbatch or
with ``cached`` the step, is |m_s - m_t|^2 / P + |C_s - C_t|^2 / (4 P^2), of the means m and covariances C of the
source's and the target's features. It stands for each of their samples; a domain with fewer than two has none.

``domain_adversarial`` (DANN, arXiv 1505.07818): a classifier of one hidden layer learns to tell the domains apart,
and the gradient that it gives the features is reversed, so that they learn to be alike. The loss is the mean of its
cross-entropy over the samples of the source, and that over those of the target: with both at log 2 = 0.693 it cannot
tell them apart.

Shapes: B samples of a microbatch, N of a scope, P joint space.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch, send
from mmmoe_pretrain.config.base import ModalitySettings
from mmmoe_pretrain.config.schedule import Weight, check_schedule, schedule_of, value_at
from mmmoe_pretrain.kinds import nearest
from mmmoe_pretrain.objectives.base import ObjectiveModule, Outputs
from mmmoe_pretrain.objectives.correlation import of_each_sample
from mmmoe_pretrain.objectives.pooled import (
    CachedSettings,
    Features,
    PooledModule,
    PooledObjective,
    PooledSettings,
    gather,
    stacked,
)
from mmmoe_pretrain.parallel.groups import Groups

SOURCE, TARGET = DOMAINS = ("source", "target")


class DomainSettings(PooledSettings):
    """``of``: the representation (a modality is one). ``field``: of a sample's JSON. ``target``: its values of the
    target domain; ``source``: of the source (empty: all others). Samples of neither take no part."""

    of: str
    field: str = Field(min_length=1)
    target: tuple[str, ...] = Field(min_length=1)
    source: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """See ``PooledSettings.named``."""
        return (self.of,)

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        if both := set(self.target) & set(self.source):
            raise ValueError(f"{', '.join(sorted(both))} is of the source and of the target; name it in one of them")
        return self

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """See ``ObjectiveSettings.check_names``."""
        if self.of not in representations:
            known = nearest(self.of, representations, "there are")
            raise ValueError(f"objectives.{name}.of {self.of}: there is no such representation; {known}")

    def domain_of(self, value: str) -> str | None:
        """``value`` of the field: the domain, or None."""
        if value in self.target:
            return TARGET
        return SOURCE if not self.source or value in self.source else None


class DomainObjective(PooledObjective):
    """Its batches have samples of two domains. A kind has ``Settings``, ``losses``, ``counts`` and ``module``."""

    def of_domains(self, batch: Batch) -> Tensor:
        """bool [B, 2]: the samples that have the representation, of the source and of the target."""
        found = [self.settings.domain_of(meta.get(self.settings.field)) for meta in batch.metas]
        is_of_B2 = torch.tensor([[its == domain for domain in DOMAINS] for its in found]).reshape(-1, 2)
        present_B = batch.pooled[self.settings.of] >= 0
        return send(is_of_B2, present_B.device) & present_B[:, None]

    def needs(self) -> dict[str, set[str]]:
        return self.ways(f"of {self.settings.of}", (self.settings.of,))

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        settings = self.settings
        sources = f"is one of {', '.join(settings.source)}" if settings.source else "is another"
        return (
            f"objectives.{self.name}: {loss} was 0 over {count} terms {so_far}. Each microbatch needs samples with "
            f"{settings.of} whose field {settings.field} is one of {', '.join(settings.target)}, and such in which "
            f"it {sources}; give the data both"
        )


class MomentSettings(DomainSettings, CachedSettings):
    kind: Literal["moment_alignment"] = "moment_alignment"


class MomentAlignment(DomainObjective):
    """See the module."""

    Settings = MomentSettings

    @property
    def losses(self) -> dict[str, float]:
        return {self.name: 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self.name: int(self.of_domains(batch).sum())}

    def module(self, embedding_size: int) -> ObjectiveModule:
        return _Moments(self)

    def flops(self, embedding_size: int, samples: float) -> float:
        return 2 * embedding_size**2  # covariances


class _Moments(PooledModule):
    """Samples of the two domains are those that have the first or the second of two representations."""

    def __init__(self, objective: MomentAlignment) -> None:
        super().__init__(objective)
        self.objective = objective

    def _features(self, outputs: Outputs, batch: Batch) -> Features:
        return Features(stacked(outputs.features, self.sides), self.objective.of_domains(batch), batch.group_ids)

    def sums(self, features: Features, groups: Groups) -> dict[str, Tensor]:
        """See ``PooledModule.sums``."""
        everyone = gather(features, groups)
        loss = distance_of_moments(everyone.rows_BRP[:, 0], *everyone.present_BR.unbind(1))
        enough = (everyone.present_BR.sum(0) >= 2).all()
        counted_N, counted_B = (its.present_BR.any(1) for its in (everyone, features))
        return {self.name: of_each_sample(loss * enough, counted_N, counted_B)}


def distance_of_moments(unit_NP: Tensor, source_N: Tensor, target_N: Tensor) -> Tensor:
    """The loss of two sets of rows; finite for any."""
    size = unit_NP.shape[1]
    x_NP = unit_NP * size**0.5
    (mean_s, square_s), (mean_t, square_t) = (_moments(x_NP, domain_N) for domain_N in (source_N, target_N))
    return (mean_s - mean_t).square().sum() / size + (square_s - square_t).square().sum() / (4 * size**2)


def _moments(x_NP: Tensor, counted_N: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [P] and the covariance [P, P]."""
    count, counted_N1 = counted_N.sum(), counted_N[:, None]
    mean_P = (x_NP * counted_N1).sum(0) / count.clamp(min=1)
    centred_NP = (x_NP - mean_P) * counted_N1
    return mean_P, centred_NP.t() @ centred_NP / (count - 1).clamp(min=1)


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
        x_BP = outputs.features[self.objective.settings.of].float()
        x_BP = _Reversed.apply(x_BP * x_BP.shape[1] ** 0.5, self._strength)
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
