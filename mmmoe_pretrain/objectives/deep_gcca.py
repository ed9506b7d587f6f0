"""Deep generalised canonical correlation analysis of two and more representations (Benton et al., arXiv 1702.02519).

It finds vectors G of P numbers for the samples that a linear map of each representation comes nearest to. With K_j
the mask of the samples that have representation j, X_j its centred rows, and K the sum of the masks: G maximises the
sum over j of ``G' K_j P_j K_j G`` with ``G' K G = I``, where P_j projects on the columns of X_j (a sample weighs in
the constraint as often as it is seen: Rastogi et al., "Multiview LSA", NAACL 2015). The maximum is the sum of the P
largest eigenvalues of ``K^(-1/2) (sum of K_j P_j K_j) K^(-1/2)``, at most P. The loss is P minus it: 0 where all
representations are equal up to linear maps. With two that all samples have it is half that of deep CCA, as far as
the ridge is small.

Samples with one of the representations alone take no part, since nothing speaks against any G there.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config.base import ModalitySettings
from mmmoe_pretrain.kinds import nearest
from mmmoe_pretrain.objectives.base import ObjectiveModule
from mmmoe_pretrain.objectives.correlation import (
    CorrelationModule,
    CorrelationSettings,
    of_each_sample,
    sum_of_largest_eigenvalues,
    whitened,
)
from mmmoe_pretrain.objectives.pooled import Features, PooledObjective, gather, present
from mmmoe_pretrain.parallel.groups import Groups


class DeepGCCASettings(CorrelationSettings):
    """``representations``: which ones (a modality is one); a sample needs two of them."""

    kind: Literal["deep_gcca"] = "deep_gcca"
    representations: tuple[str, ...] = Field(min_length=2)

    @property
    def named(self) -> tuple[str, ...]:
        """See ``PooledSettings.named``."""
        return self.representations

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """See ``ObjectiveSettings.check_names``."""
        where = f"objectives.{name}.representations"
        for each in self.representations:
            if each not in representations:
                raise ValueError(f"{where} {each!r}: {nearest(each, representations, 'there are')}")
        if len(set(self.representations)) < len(self.representations):
            raise ValueError(f"{where} {list(self.representations)}: name each of them once")
        super().check_names(name, modalities, representations)


class DeepGCCA(PooledObjective):
    """See the module."""

    Settings = DeepGCCASettings

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.correlated = tuple(combinations(self.representations, 2))

    @property
    def losses(self) -> dict[str, float]:
        return {self.name: 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        present_BR = present(batch, self.representations)
        return {self.name: int(in_agreement(present_BR).sum())}

    def needs(self) -> dict[str, set[str]]:
        return {what: way for pair in self.correlated for what, way in self.ways("-".join(pair), pair).items()}

    def module(self, embedding_size: int) -> ObjectiveModule:
        return Agreement(self)

    def flops(self, embedding_size: int, samples: float) -> float:
        width = len(self.representations) * embedding_size
        of_samples = 4 * width * embedding_size + 2 * width**2 + 2 * width * embedding_size
        return of_samples + 9 * width**3 / max(1.0, samples)  # eigenvectors (Golub and Van Loan)

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        return (
            f"objectives.{self.name} had {count} samples with two of {', '.join(self.representations)} {so_far}, "
            f"and never two in a global microbatch. Give the data such samples, or set "
            f"objectives.{self.name}.cached: true"
        )


class Agreement(CorrelationModule):
    """The loss of all representations."""

    def __init__(self, objective: DeepGCCA) -> None:
        super().__init__(objective)
        self.ridges = [objective.settings.ridge_of(side) for side in self.sides]

    def sums(self, features: Features, groups: Groups) -> dict[str, Tensor]:
        """See ``PooledModule.sums``."""
        everyone = gather(features, groups)
        counted_N, counted_B = (in_agreement(its.present_BR) for its in (everyone, features))
        views_NR = everyone.present_BR & counted_N[:, None]
        weight_N1 = views_NR.sum(dim=1, keepdim=True).clamp(min=1).double().rsqrt()
        parts = [
            weight_N1 * whitened(everyone.rows_BRP[:, place], views_NR[:, place], ridge)
            for place, ridge in enumerate(self.ridges)
        ]
        size = everyone.rows_BRP.shape[2]
        loss = size - sum_of_largest_eigenvalues(torch.cat(parts, dim=1), size)
        return {self.name: of_each_sample(loss, counted_N, counted_B)}


def in_agreement(present_BR: Tensor) -> Tensor:
    """[B]: which samples take part."""
    return present_BR.sum(dim=1) >= 2
