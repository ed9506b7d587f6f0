"""Low-rank fusion (LMF, arXiv 1806.00064): tensor fusion of the whole pooled vectors z_p followed by a linear map,
whose weight is a sum of ``rank`` outer products of one factor a part, so that the outer product is never formed:

    h = sum over r of the product over p (elementwise) of  W_p,r [z_p; 1].

Of an absent part (``missing: allow``) z is zero, which leaves its factor of the 1. Where the paper adds weights of
the ranks and a bias, the joint head follows.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from mmmoe_pretrain.batch import Spans
from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.config.base import RepresentationSettings
from mmmoe_pretrain.models.fusion.base import Fusion


class LowRankSettings(RepresentationSettings):
    """``size``: of the result; None: model.hidden_size."""

    kind: Literal["low_rank"] = "low_rank"
    rank: int = Field(4, ge=1, le=1024)
    size: int | None = Field(None, ge=1, le=1 << 15)


class LowRank(Fusion):
    """See the module. Factors are [R W, D + 1], with the 1 last."""

    Settings = LowRankSettings

    def __init__(self, settings: LowRankSettings, model: ModelConfig) -> None:
        super().__init__(settings, model)
        self.names, self.rank = settings.parts, settings.rank
        self.width = settings.size or model.hidden_size
        rows, columns = self.rank * self.width, model.hidden_size + 1
        self.parts = nn.ParameterDict({name: nn.Parameter(torch.empty(rows, columns)) for name in self.names})

    def forward(self, x_nD: Tensor, mean_PBD: Tensor, present_PB: Tensor, spans_P: tuple[Spans, ...]) -> Tensor:
        with_one_PBE = F.pad(mean_PBD, (0, 1), value=1.0)
        factors = [F.linear(z_BE, self.parts[name]) for name, z_BE in zip(self.names, with_one_PBE, strict=True)]
        product = functools.reduce(torch.mul, factors)
        return product.unflatten(1, (self.rank, self.width)).sum(dim=1)
