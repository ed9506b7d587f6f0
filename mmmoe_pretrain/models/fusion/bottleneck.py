"""Fusion by attention bottlenecks (MBT, arXiv 2107.00135): parts exchange information through a few learned vectors
alone. In each of ``num_layers`` blocks, which each part has for itself, the tokens of a part and the bottlenecks
attend to each other; then the bottlenecks are the mean of what the parts made of them. The vector is the mean over
parts of the mean over tokens. A part reads in a block what the others wrote in the block before, so there are two or
more.

An absent part (``missing: allow``) takes no part in either mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mmmoe_pretrain.batch import Spans, send
from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.config.base import RepresentationSettings
from mmmoe_pretrain.models.fusion.base import Fusion
from mmmoe_pretrain.models.fusion.cross import CrossBlock, CrossPlan, means_of, plan_cross, tokens_of


class BottleneckSettings(RepresentationSettings):
    reads_tokens: ClassVar[bool] = True

    kind: Literal["bottleneck"] = "bottleneck"
    num_bottlenecks: int = Field(4, ge=1, le=4096)
    num_layers: int = Field(2, ge=2, le=64)


class Bottleneck(Fusion):
    """See the module."""

    Settings = BottleneckSettings

    def __init__(self, settings: BottleneckSettings, model: ModelConfig) -> None:
        super().__init__(settings, model)
        self.names, self.num_layers = settings.parts, settings.num_layers
        self.bottlenecks = nn.Parameter(torch.empty(settings.num_bottlenecks, model.hidden_size))
        blocks = {
            name: nn.ModuleList(CrossBlock(model.hidden_size, model.num_heads) for _ in range(self.num_layers))
            for name in self.names
        }
        self.parts = nn.ModuleDict(blocks)

    def forward(self, x_nD: Tensor, mean_PBD: Tensor, present_PB: Tensor, spans_P: tuple[Spans, ...]) -> Tensor:
        num_samples, (count, width) = mean_PBD.shape[1], self.bottlenecks.shape
        share_PB = present_PB.to(mean_PBD.dtype) / present_PB.sum(dim=0).clamp(min=1)
        found = [tokens_of(x_nD, [spans]) for spans in spans_P]
        places = [_places(lengths, count, x_nD.device) for _, lengths in found]
        rows = [tokens.index_select(0, its.token_r) for (tokens, _), its in zip(found, places, strict=True)]
        blocks = [cast(nn.ModuleList, self.parts[name]) for name in self.names]
        shared = self.bottlenecks.expand(num_samples, count, width).reshape(-1, width)
        for layer in range(self.num_layers):
            for part, its in enumerate(places):
                x_rD = torch.where(its.is_shared_r[:, None], shared.index_select(0, its.shared_r), rows[part])
                rows[part] = blocks[part][layer](x_rD, x_rD, its.plan)
            with_zero = (torch.cat([x_rD, x_rD.new_zeros(1, width)]) for x_rD in rows)
            written = (x_rD.index_select(0, its.row_of_shared) for x_rD, its in zip(with_zero, places, strict=True))
            shared = _weighed(share_PB, (x.view(num_samples, count, width) for x in written)).flatten(0, 1)
        means = (
            means_of(x_rD.index_select(0, its.row_of_token), lengths)
            for x_rD, its, (_, lengths) in zip(rows, places, found, strict=True)
        )
        return _weighed(share_PB, means)


@dataclass(frozen=True)
class _Places:
    """The rows r of one part: of each sample that has it the tokens, then the bottlenecks. ``token_r`` and
    ``shared_r``: which token or which bottleneck of all samples a row is, 0 where it is the other. ``row_of_shared``:
    behind the last row for samples without the part."""

    plan: CrossPlan
    token_r: Tensor
    shared_r: Tensor
    is_shared_r: Tensor
    row_of_token: Tensor
    row_of_shared: Tensor


def _places(lengths: list[int], count: int, device: torch.device) -> _Places:
    length_B = np.asarray(lengths, dtype=np.int64)
    whole_B = np.where(length_B > 0, length_B + count, 0)
    sample_r = np.repeat(np.arange(len(whole_B)), whole_B)
    behind_r = np.arange(len(sample_r)) - (np.cumsum(whole_B) - whole_B + length_B)[sample_r]  # the sample's tokens
    is_shared_r = behind_r >= 0
    token_r = np.where(is_shared_r, 0, np.cumsum(~is_shared_r) - 1)
    shared_r = np.where(is_shared_r, sample_r * count + behind_r, 0)
    row_of_shared = np.full(len(whole_B) * count, len(sample_r), dtype=np.int64)
    row_of_shared[shared_r[is_shared_r]] = np.flatnonzero(is_shared_r)
    arrays = (token_r, shared_r, is_shared_r, np.flatnonzero(~is_shared_r), row_of_shared)
    plan = plan_cross(whole_B.tolist(), whole_B.tolist(), device)
    return _Places(plan, *(send(torch.from_numpy(array), device) for array in arrays))


def _weighed(share_PB: Tensor, values: Iterable[Tensor]) -> Tensor:
    """The sum over parts of their [B, ...], weighed."""
    parts = zip(share_PB, values, strict=True)
    return torch.stack([share_B.view(-1, *[1] * (value.ndim - 1)) * value for share_B, value in parts]).sum(dim=0)
