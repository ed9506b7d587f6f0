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

    def module(self, embedding_size: int) -> ObjectiveModule:
        return InfoNCE(self, embedding_size)


class InfoNCE(PairModule):
    """The cross-entropy of a query's own other side among its candidates."""

    def one_way(self, pair: str, scale: Tensor, among: Candidates) -> Tensor:
        logits_BN = scale * among.queries_BP @ among.keys_NP.t()
        logits_BN = logits_BN.masked_fill(~among.usable_BN, MASKED)
        loss_B = F.cross_entropy(logits_BN, among.own_B, reduction="none")
        return (loss_B * among.both_B).sum()
