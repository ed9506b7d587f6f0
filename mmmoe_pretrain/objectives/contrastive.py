"""Contrastive learning by a softmax over candidates: symmetric InfoNCE (CLIP, arXiv 2103.00020; several pairs as in
the pairwise sum of ImageBind, arXiv 2305.05665)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from mmmoe_pretrain.objectives.base import ObjectiveModule
from mmmoe_pretrain.objectives.pairs import Candidates, PairModule, PairObjective, PairSettings

MASKED = -1e4  # a logit that weighs nothing; finite, so that a row of them has a gradient of zero


class ContrastiveSettings(PairSettings):
    kind: Literal["contrastive"] = "contrastive"


class Contrastive(PairObjective):
    """See the module."""

    Settings = ContrastiveSettings

    def module(self) -> ObjectiveModule:
        return InfoNCE(self)


class InfoNCE(PairModule):
    """The cross-entropy of a query's own other side among its candidates."""

    def one_way(self, pair: str, scale: Tensor, among: Candidates) -> Tensor:
        logits_BG = scale * among.queries_BP @ among.keys_GP.t()
        logits_BG = logits_BG.masked_fill(~among.usable_BG, MASKED)
        loss_B = F.cross_entropy(logits_BG, among.own_B, reduction="none")
        return (loss_B * among.both_B).sum()
