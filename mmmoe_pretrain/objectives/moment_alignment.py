"""Adaptation to a domain by its moments (Deep CORAL, arXiv 1607.01719, with the means, too).

The loss of a scope, a global microbatch or with ``cached`` the step, is |m_s - m_t|^2 / P + |C_s - C_t|^2 / (4 P^2),
of the means m and covariances C of the source's and the target's vectors, whose numbers have a mean square of 1. It
stands for each of their samples; a domain with fewer than two has none.

Shapes: B samples of a microbatch, N of a scope, P joint space.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.objectives.base import ObjectiveModule, Outputs
from mmmoe_pretrain.objectives.correlation import of_each_sample
from mmmoe_pretrain.objectives.domains import DomainObjective, DomainSettings, scaled
from mmmoe_pretrain.objectives.pooled import CachedSettings, Features, PooledModule, gather, stacked
from mmmoe_pretrain.parallel.groups import Groups


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
    x_NP = scaled(unit_NP)
    (mean_s, square_s), (mean_t, square_t) = (_moments(x_NP, domain_N) for domain_N in (source_N, target_N))
    return (mean_s - mean_t).square().sum() / size + (square_s - square_t).square().sum() / (4 * size**2)


def _moments(x_NP: Tensor, counted_N: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [P] and the covariance [P, P]."""
    count, counted_N1 = counted_N.sum(), counted_N[:, None]
    mean_P = (x_NP * counted_N1).sum(0) / count.clamp(min=1)
    centred_NP = (x_NP - mean_P) * counted_N1
    return mean_P, centred_NP.t() @ centred_NP / (count - 1).clamp(min=1)
