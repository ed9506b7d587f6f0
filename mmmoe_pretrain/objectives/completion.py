"""Completion of a missing modality: a head predicts the vector of one representation, the ``target``, from those of
others, the ``source``. It learns from samples that have all of them. Where the target is missing at test time, the
prediction stands in for it (evaluate/imputation.py).

The target has no gradient: it is the model's own vector, or with ``from_average`` that of the model with the average
of its weights. With a source of few modalities and a target that is a fusion of more, the latter is hallucination
from a paired teacher (Hoffman et al., "Learning with Side Information through Modality Hallucination", CVPR 2016).
The source has a gradient, so the trunk, too, learns what source and target share. It stands beside a contrastive
loss: alone, equal vectors for all samples would be a minimum.

The head is a multilayer perceptron with one hidden layer, in fp32. Its input is the unit vectors of the source, each
number times sqrt(P), so that it is about 1. What it predicts:

* ``head: regression``: a vector v. The loss of a sample is 1 - cos(v, target), half the squared distance of the two
  unit vectors. The best prediction is the direction of the mean of the targets of equal sources.
* ``head: mixture``: a density of the target, where several values may be right: a mixture of K Gaussians with
  diagonal covariance (mixture density network, Bishop 1994). The loss of a sample is its negative log-likelihood in
  nats, over the P numbers together, so a weight of about 1 / P makes it comparable to others. It can be negative.
  A standard deviation is at least ``min_scale`` / sqrt(P): without a floor the density of a sample that is known by
  heart has no bound. The prediction for evaluation is the mean of the mixture; ``Mixture.sample`` draws.

Shapes: B samples of a microbatch, P joint space, K Gaussians, X inputs, H hidden numbers and O outputs of the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config.base import ModalitySettings, Names, check_missing
from mmmoe_pretrain.objectives.base import ObjectiveModule, Outputs
from mmmoe_pretrain.objectives.pooled import PooledObjective, PooledSettings, has_all_parts, present, stacked
from mmmoe_pretrain.parallel.groups import Groups

EPS = 1e-6  # of unit lengths, as that of features


class CompletionSettings(PooledSettings):
    """``source`` and ``target``: representations (a modality is one). ``hidden_size``: of the head. ``components``
    and ``min_scale`` are of a mixture. ``from_average``: the target is of the model with the average of its weights
    (``optimizer.average``)."""

    kind: Literal["completion"] = "completion"
    source: Names = Field(min_length=1)
    target: str
    head: Literal["regression", "mixture"] = "regression"
    hidden_size: int = Field(256, ge=1)
    components: int = Field(8, ge=1, le=1024)
    min_scale: float = Field(0.1, gt=0)
    from_average: bool = False

    @property
    def named(self) -> tuple[str, ...]:
        """See ``PooledSettings.named``."""
        return (*self.source, self.target)

    @property
    def taught(self) -> bool:
        """See ``ObjectiveSettings.taught``."""
        return self.from_average

    @property
    def below_zero(self) -> bool:
        """See ``ObjectiveSettings.below_zero``."""
        return self.head == "mixture"

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """See ``ObjectiveSettings.check_names``."""
        places = f"objectives.{name}.target", f"objectives.{name}.source"
        check_missing(self.target, self.source, representations, places)


class Completion(PooledObjective):
    """See the module."""

    Settings = CompletionSettings

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.completed = (self.settings.source, self.settings.target)
        self.loss = f"{self.name}/{self.settings.target}"

    @property
    def losses(self) -> dict[str, float]:
        return {self.loss: 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {self.loss: int(self.taking_part(batch).sum())}

    def taking_part(self, batch: Batch) -> Tensor:
        """bool [B]: the samples with all of the source and every part of the target, also of one that could do
        without."""
        target = self.all_representations[self.settings.target]
        return present(batch, self.settings.source).all(dim=1) & has_all_parts(batch, target, [*self.modalities])

    def needs(self) -> dict[str, set[str]]:
        what = f"of {self.settings.target} by {' and '.join(self.settings.source)}"
        whole = {*self.all_representations[self.settings.target].modalities}
        return {what: way | whole for what, way in self.ways(what, self.settings.source).items()}

    def module(self, embedding_size: int) -> ObjectiveModule:
        return _Head(self, embedding_size)

    def complete(self, module: ObjectiveModule, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """See ``Objective.complete``."""
        assert isinstance(module, _Head)
        with torch.inference_mode():
            rows = {name: torch.from_numpy(features[name]) for name in self.settings.source}
            return module.predicted(module.output(rows)).numpy()

    def flops(self, embedding_size: int, samples: float) -> float:
        inputs = len(self.settings.source) * embedding_size
        return 2 * self.settings.hidden_size * (inputs + outputs_of(self.settings, embedding_size))

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        if count:
            return super().why_idle(loss, count, so_far)
        source, target = " and ".join(self.settings.source), self.settings.target
        return (
            f"objectives.{self.name} had no sample with {source} and {target} {so_far}, so {target} cannot be "
            f"learned from it. Give the data samples that have both, or set its weight: 0"
        )


@dataclass(frozen=True)
class Mixture:
    """A density of vectors [B, P]: K Gaussians with diagonal covariance."""

    logit_BK: Tensor
    mean_BKP: Tensor
    scale_BKP: Tensor  # standard deviations

    def log_prob(self, value_BP: Tensor) -> Tensor:
        """[B], in nats."""
        distance_BKP = (value_BP[:, None] - self.mean_BKP) / self.scale_BKP
        each_BK = -(0.5 * distance_BKP.square() + self.scale_BKP.log()).sum(dim=-1)
        log_weight_BK = F.log_softmax(self.logit_BK, dim=-1)
        return torch.logsumexp(log_weight_BK + each_BK, dim=-1) - 0.5 * math.log(2 * math.pi) * value_BP.shape[1]

    def mean(self) -> Tensor:
        """[B, P]."""
        return (self.logit_BK.softmax(dim=-1)[..., None] * self.mean_BKP).sum(dim=1)

    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """[number, B, P]: draws of each row."""
        weight_BK = self.logit_BK.softmax(dim=-1)
        chosen_nB = torch.multinomial(weight_BK, number, replacement=True, generator=generator).t()
        rows = torch.arange(weight_BK.shape[0], device=weight_BK.device)
        mean_nBP, scale_nBP = self.mean_BKP[rows, chosen_nB], self.scale_BKP[rows, chosen_nB]
        noise = torch.randn(mean_nBP.shape, generator=generator, dtype=mean_nBP.dtype, device=mean_nBP.device)
        return mean_nBP + scale_nBP * noise


def outputs_of(settings: CompletionSettings, embedding_size: int) -> int:
    """Numbers that the head predicts."""
    return embedding_size if settings.head == "regression" else settings.components * (2 * embedding_size + 1)


class _Head(ObjectiveModule):
    """The perceptron, and the targets of a teacher."""

    def __init__(self, objective: Completion, embedding_size: int) -> None:
        super().__init__()
        self.objective, self.settings = objective, objective.settings
        hidden, inputs = self.settings.hidden_size, len(self.settings.source) * embedding_size
        outputs = outputs_of(self.settings, embedding_size)
        self.up = nn.Parameter(torch.empty(hidden, inputs))
        self.up_bias = nn.Parameter(torch.zeros(hidden))
        self.down = nn.Parameter(torch.empty(outputs, hidden))
        self.down_bias = nn.Parameter(torch.zeros(outputs))
        self.root = math.sqrt(embedding_size)
        self._taught: list[Tensor] = []  # [B, P]: the teacher's targets, of the microbatches to come

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        """The sum of the losses over this rank's samples."""
        # Without a teacher's pass, as in a plan of memory, the model's own vector stands for it.
        own = outputs.features[self.settings.target]
        target_BP = (self._taught.pop(0) if self._taught else own).detach().float()
        found_BO = self.output(outputs.features)
        if self.settings.head == "regression":
            loss_B = 1 - (self.predicted(found_BO) * target_BP).sum(dim=-1)
        else:
            loss_B = -self.mixture(found_BO).log_prob(target_BP)
        # Engines wait for a gradient of every parameter; that of a target which nothing else reads is zero.
        return {self.objective.loss: (loss_B * self.objective.taking_part(batch)).sum() + 0 * own.sum()}

    def output(self, features: Mapping[str, Tensor]) -> Tensor:
        """[B, O]: what the head makes of the source."""
        x_BX = self.root * stacked(features, self.settings.source).flatten(1)
        hidden_BH = F.gelu(F.linear(x_BX, self.up.float(), self.up_bias.float()))
        return F.linear(hidden_BH, self.down.float(), self.down_bias.float())

    def mixture(self, found_BO: Tensor) -> Mixture:
        """The density. Numbers of a unit vector are about 1 / sqrt(P), and the head's about 1."""
        count = self.settings.components
        logit_BK, rest_BKX = found_BO[:, :count], found_BO[:, count:].unflatten(1, (count, -1))
        mean_BKP, free_BKP = rest_BKX.chunk(2, dim=-1)
        scale_BKP = self.settings.min_scale + F.softplus(free_BKP)
        return Mixture(logit_BK, mean_BKP / self.root, scale_BKP / self.root)

    def predicted(self, found_BO: Tensor) -> Tensor:
        """[B, P]: the unit vector that stands in for the target."""
        whole = found_BO if self.settings.head == "regression" else self.mixture(found_BO).mean()
        return F.normalize(whole, dim=-1, eps=EPS)

    def teach(self, outputs: Outputs, batch: Batch, groups: Groups) -> None:
        """See ``ObjectiveModule.teach``."""
        self._taught.append(outputs.features[self.settings.target])

    def after_step(self, committed: bool) -> None:
        self._taught = []
