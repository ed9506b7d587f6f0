"""Tensor fusion (TFN, arXiv 1707.07250): each part is projected to ``size`` numbers z, and the vector is the outer
product of all [1; z], flattened. So it has a number for every product of numbers of different parts, those of fewer
parts included, and (size + 1) ** P in all; the joint head, which reads it, grows with that.

Of an absent part (``missing: allow``) z is zero, which leaves the products without it.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmmoe_pretrain.batch import Spans
from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.config.base import RepresentationSettings
from mmmoe_pretrain.models.fusion.base import Fusion

MAX_WIDTH = 1 << 15


class TensorSettings(RepresentationSettings):
    """``size``: numbers that each part is projected to."""

    kind: Literal["tensor"] = "tensor"
    size: int = Field(16, ge=1, lt=MAX_WIDTH)

    @property
    def width(self) -> int:
        return (self.size + 1) ** len(self.parts)

    @model_validator(mode="after")
    def _is_not_too_wide(self) -> TensorSettings:
        if self.width > MAX_WIDTH:
            fits = max((n for n in range(1, self.size) if (n + 1) ** len(self.parts) <= MAX_WIDTH), default=0)
            smaller = f"set size to {fits} or less, or choose" if fits else "choose"
            raise ValueError(
                f"size {self.size} with {len(self.parts)} parts makes (size + 1) ** {len(self.parts)} = "
                f"{self.width:,} products, and {MAX_WIDTH:,} are the most; {smaller} kind: low_rank, which grows "
                f"with the number of parts and not by its power"
            )
        return self


class TensorFusion(Fusion):
    """See the module."""

    Settings = TensorSettings

    def __init__(self, settings: TensorSettings, model: ModelConfig) -> None:
        super().__init__(settings, model)
        self.names, self.width = settings.parts, settings.width
        of_part = {name: nn.Linear(model.hidden_size, settings.size, bias=False) for name in self.names}
        self.parts = nn.ModuleDict(of_part)

    def forward(self, x_nD: Tensor, mean_PBD: Tensor, present_PB: Tensor, spans_P: tuple[Spans, ...]) -> Tensor:
        product = mean_PBD.new_ones(mean_PBD.shape[1], 1)
        for name, mean_BD in zip(self.names, mean_PBD, strict=True):
            with_one = F.pad(self.parts[name](mean_BD), (1, 0), value=1.0)
            product = torch.einsum("bi,bj->bij", product, with_one).flatten(1)
        return product
