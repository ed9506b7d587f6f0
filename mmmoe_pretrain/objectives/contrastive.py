"""Contrastive learning between pairs of modalities (CLIP, arXiv 2103.00020; three ways as in
the pairwise sum of ImageBind, arXiv 2305.05665).

Features are gathered over the data-parallel ranks, so the negatives are those of the global
microbatch. A sample that lacks one of the two takes no part as a query; samples of the same
group (the same thing shown or said again) are never each other's negatives. The loss of a pair is
the mean over the samples of the step that have both (``counts.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import MODALITIES, MODALITY_ID, Batch
from mmmoe_pretrain.config import ContrastiveConfig
from mmmoe_pretrain.parallel.collectives import gather_rows
from mmmoe_pretrain.parallel.groups import Groups

MAX_LOG_SCALE = math.log(100.0)
MASKED = -1e4  # a logit that weighs nothing; finite, so that a row of them has a gradient of zero


@dataclass(frozen=True)
class Gathered:
    """The global microbatch, G = ranks * B samples."""

    features_GMP: Tensor
    present_GM: Tensor
    group_ids_G: Tensor
    first: int  # global index of this rank's first sample


class ContrastiveObjective(nn.Module):
    """Symmetric InfoNCE with a learned temperature for each pair."""

    def __init__(self, config: ContrastiveConfig) -> None:
        super().__init__()
        self.config = config
        start = math.log(1.0 / config.initial_temperature)
        self.log_scale = nn.ParameterDict(
            {pair: nn.Parameter(torch.full((1,), start)) for pair in sorted(config.pairs)}
        )

    def forward(
        self, features: dict[str, Tensor], present_MB: Tensor, group_ids: Tensor, groups: Groups
    ) -> dict[str, Tensor]:
        """Of each pair, the sum over this rank's samples of their losses in nats, not yet weighted."""
        everyone = _gather(features, present_MB, group_ids, groups)
        sums, rows = {}, present_MB.shape[1]
        for pair, log_scale in self.log_scale.items():
            a, b = _modalities(pair)
            scale = _bounded(log_scale).float().exp()
            sums[pair] = 0.5 * (_one_way(everyone, a, b, rows, scale) + _one_way(everyone, b, a, rows, scale))
        return sums


def num_pairs(batch: Batch, pair: str) -> int:
    """Samples that have both modalities of ``pair``."""
    a, b = _modalities(pair)
    return int((batch.present_MB[a] & batch.present_MB[b]).sum())


def _modalities(pair: str) -> tuple[int, int]:
    first, second = pair.split("-")
    return MODALITY_ID[first], MODALITY_ID[second]


def _bounded(log_scale: Tensor) -> Tensor:
    """The parameter, brought back in place where it passed the bound: a clamp in the graph would
    have no gradient there, and it would stay for good."""
    with torch.no_grad():
        log_scale.clamp_(max=MAX_LOG_SCALE)
    return log_scale


def _gather(features: dict[str, Tensor], present_MB: Tensor, group_ids: Tensor, groups: Groups) -> Gathered:
    local_BMP = torch.stack([features[name].float() for name in MODALITIES], dim=1)
    flags = torch.cat([present_MB.t().to(torch.int64), group_ids[:, None]], dim=1)
    flags_G = gather_rows(flags, groups.data)
    return Gathered(
        gather_rows(local_BMP, groups.data),
        flags_G[:, :-1].bool(),
        flags_G[:, -1],
        groups.data_rank * group_ids.shape[0],
    )


def _one_way(everyone: Gathered, query: int, key: int, rows: int, scale: Tensor) -> Tensor:
    """The sum of the cross-entropy over this rank's samples that have both modalities."""
    mine = slice(everyone.first, everyone.first + rows)
    both_G = everyone.present_GM[:, query] & everyone.present_GM[:, key]
    logits_BG = scale * everyone.features_GMP[mine, query] @ everyone.features_GMP[:, key].t()
    itself_BG = (
        torch.arange(both_G.numel(), device=both_G.device)
        == torch.arange(everyone.first, everyone.first + rows, device=both_G.device)[:, None]
    )
    same_BG = everyone.group_ids_G[mine, None] == everyone.group_ids_G
    usable_BG = everyone.present_GM[:, key] & (~same_BG | itself_BG) & both_G[mine, None]
    logits_BG = logits_BG.masked_fill(~usable_BG, MASKED)
    target_B = torch.arange(everyone.first, everyone.first + rows, device=both_G.device)
    loss_B = torch.nn.functional.cross_entropy(logits_BG, target_B, reduction="none")
    return (loss_B * both_G[mine]).sum()
