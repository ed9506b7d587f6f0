"""Fusion by latents, as in the Perceiver (arXiv 2103.03206): learned vectors that attend to all tokens of a sample's
parts, each part a segment of its own in the trunk, then an MLP; the vector is the mean of the latents. The cost grows
with the number of tokens times that of latents. One cross-attention, and no blocks over the latents after it.

An absent part (``missing: allow``) has no tokens to attend to.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmmoe_pretrain.batch import Spans
from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.config.base import RepresentationSettings
from mmmoe_pretrain.models.fusion.base import Fusion
from mmmoe_pretrain.models.fusion.cross import CrossBlock, plan_cross, tokens_of


class LatentsSettings(RepresentationSettings):
    reads_tokens: ClassVar[bool] = True

    kind: Literal["latents"] = "latents"
    num_latents: int = Field(8, ge=1, le=4096)


class Latents(Fusion):
    """See the module."""

    Settings = LatentsSettings

    def __init__(self, settings: LatentsSettings, model: ModelConfig) -> None:
        super().__init__(settings, model)
        self.latents = nn.Parameter(torch.empty(settings.num_latents, model.hidden_size))
        self.block = CrossBlock(model.hidden_size, model.num_heads)

    def forward(self, x_nD: Tensor, mean_PBD: Tensor, present_PB: Tensor, spans_P: tuple[Spans, ...]) -> Tensor:
        num_samples, (count, width) = mean_PBD.shape[1], self.latents.shape
        tokens_kD, lengths = tokens_of(x_nD, spans_P)
        plan = plan_cross([count] * num_samples, lengths, x_nD.device)
        latents = self.latents.expand(num_samples, count, width).reshape(-1, width)
        return self.block(latents, tokens_kD, plan).view(num_samples, count, width).mean(dim=1)
