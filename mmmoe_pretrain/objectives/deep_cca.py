"""Deep canonical correlation analysis (Andrew et al., "Deep Canonical Correlation Analysis", ICML 2013).

The canonical correlations of x and y are the singular values of ``Sxx^(-1/2) Sxy Syy^(-1/2)``, with a ridge on Sxx
and Syy. The total correlation is their sum, at most P. The loss of a pair is P minus it: the paper's, but 0 where x
and y are equal up to a linear map. Vectors that it trains are compared after linear CCA (evaluate/cca.py).
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from mmmoe_pretrain.objectives.base import ObjectiveModule
from mmmoe_pretrain.objectives.correlation import (
    CorrelationModule,
    CorrelationSettings,
    of_each_sample,
    sum_of_singular_values,
    whitened,
)
from mmmoe_pretrain.objectives.pooled import Features, PairwiseObjective, PairwiseSettings, gather
from mmmoe_pretrain.parallel.groups import Groups


class DeepCCASettings(CorrelationSettings, PairwiseSettings):
    """See ``PairwiseSettings`` and ``CorrelationSettings``."""

    kind: Literal["deep_cca"] = "deep_cca"


class DeepCCA(PairwiseObjective):
    """See the module."""

    Settings = DeepCCASettings

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.correlated = tuple(self.pairs.values())

    def module(self, embedding_size: int) -> ObjectiveModule:
        return TotalCorrelation(self)

    def flops(self, embedding_size: int, samples: float) -> float:
        of_samples = 10 * embedding_size**2  # two covariances, two triangular solutions, one product
        of_all = 26 * embedding_size**3 / max(1.0, samples)  # singular vectors (Golub and Van Loan)
        return len(self.pairs) * (of_samples + of_all)

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        if not count:
            return super().why_idle(loss, count, so_far)
        return (
            f"objectives.{loss} had no correlation {so_far}: a global microbatch never had two samples with both. "
            f"Lower train.num_microbatches, or set objectives.{self.name}.cached: true"
        )


class TotalCorrelation(CorrelationModule):
    """The loss of each pair."""

    def __init__(self, objective: DeepCCA) -> None:
        super().__init__(objective)
        self.pairs, self.ridge_of = objective.pairs, objective.settings.ridge_of

    def sums(self, features: Features, groups: Groups) -> dict[str, Tensor]:
        """See ``PooledModule.sums``."""
        everyone = gather(features, groups)
        found = {}
        for pair, sides in self.pairs.items():
            a, b = (self.sides.index(side) for side in sides)
            both_N, both_B = (its.present_BR[:, a] & its.present_BR[:, b] for its in (everyone, features))
            x_NP, y_NP = (
                whitened(everyone.rows_BRP[:, place], both_N, self.ridge_of(side))
                for place, side in zip((a, b), sides, strict=True)
            )
            loss = x_NP.shape[1] - sum_of_singular_values(x_NP.t() @ y_NP)
            found[f"{self.name}/{pair}"] = of_each_sample(loss, both_N, both_B)
        return found
