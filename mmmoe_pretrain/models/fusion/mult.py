"""Fusion by pairwise directional cross-attention, as in MulT (arXiv 1906.00295): for each ordered pair of parts, the
tokens of one attend to those of the other in a block of the pair's own; the vector is the concatenation of the pairs'
means over tokens, P (P - 1) D numbers. MulT's self-attention over the concatenation is left out, since each part is a
segment of its own that passed the trunk.

A pair whose second part is absent (``missing: allow``) is the first part's tokens through the block without
attention; a pair whose first part is absent is zero.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import Spans
from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.config.base import RepresentationSettings
from mmmoe_pretrain.models.fusion.base import Fusion
from mmmoe_pretrain.models.fusion.cross import CrossBlock, means_of, plan_cross, tokens_of


class MulTSettings(RepresentationSettings):
    reads_tokens: ClassVar[bool] = True

    kind: Literal["mult"] = "mult"


class MulT(Fusion):
    """See the module."""

    Settings = MulTSettings

    def __init__(self, settings: MulTSettings, model: ModelConfig) -> None:
        super().__init__(settings, model)
        self.names = settings.parts
        self.parts = nn.ModuleDict({name: _Directions(name, settings, model) for name in self.names})
        self.width = len(self.names) * (len(self.names) - 1) * model.hidden_size

    def forward(self, x_nD: Tensor, mean_PBD: Tensor, present_PB: Tensor, spans_P: tuple[Spans, ...]) -> Tensor:
        found = [tokens_of(x_nD, [spans]) for spans in spans_P]
        tokens = dict(zip(self.names, (tokens_kD for tokens_kD, _ in found), strict=True))
        lengths = dict(zip(self.names, (its for _, its in found), strict=True))
        return torch.cat([self.parts[name](tokens, lengths) for name in self.names], dim=1)


class _Directions(nn.Module):
    """From all other parts to one."""

    def __init__(self, name: str, settings: MulTSettings, model: ModelConfig) -> None:
        super().__init__()
        self.name, self.others = name, [other for other in settings.parts if other != name]
        self.parts = nn.ModuleDict({other: CrossBlock(model.hidden_size, model.num_heads) for other in self.others})

    def forward(self, tokens: dict[str, Tensor], lengths: dict[str, list[int]]) -> Tensor:
        own_qD, own, means = tokens[self.name], lengths[self.name], []
        for other in self.others:
            plan = plan_cross(own, lengths[other], own_qD.device)
            means.append(means_of(self.parts[other](own_qD, tokens[other], plan), own))
        return torch.cat(means, dim=1)
