"""Contrastive learning by a sigmoid for each query and candidate: do they belong together? (SigLIP, arXiv 2303.15343)

With temperature t and bias b, both learned, the loss of query i is the sum over its candidates j of
``-log sigmoid(z_ij (x_i y_j / t + b))``, where z is 1 for its own other side and -1 for a negative. The mean of both
ways round is SigLIP's where no sample lacks a side.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmmoe_pretrain.objectives.base import ObjectiveModule
from mmmoe_pretrain.objectives.pairs import Candidates, PairModule, PairObjective, PairSettings


class SigmoidContrastiveSettings(PairSettings):
    """``initial_bias``: far below 0, since nearly all candidates are negatives."""

    kind: Literal["sigmoid_contrastive"] = "sigmoid_contrastive"
    initial_temperature: float = Field(0.1, ge=0.01, le=100)  # it never falls below 0.01
    initial_bias: float = Field(-10.0, ge=-100, le=0)


class SigmoidContrastive(PairObjective):
    """See the module."""

    Settings = SigmoidContrastiveSettings

    def module(self, embedding_size: int) -> ObjectiveModule:
        return SigmoidLoss(self, embedding_size, self.settings.initial_bias)


class SigmoidLoss(PairModule):
    """A learned bias for each pair beside its temperature."""

    def __init__(self, objective: PairObjective, embedding_size: int, initial_bias: float) -> None:
        super().__init__(objective, embedding_size)
        self.offset = nn.ParameterDict({pair: nn.Parameter(torch.full((1,), initial_bias)) for pair in self.pairs})

    def one_way(self, pair: str, scale: Tensor, among: Candidates) -> Tensor:
        logits_BN = scale * among.queries_BP @ among.keys_NP.t() + self.offset[pair].float()
        loss_BN = -F.logsigmoid(torch.where(among.is_own_BN, logits_BN, -logits_BN))
        return (loss_BN * among.usable_BN).sum()
