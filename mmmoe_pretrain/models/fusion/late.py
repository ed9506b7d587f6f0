"""Late fusion: each part is pooled alone, and the vector is their weighted sum. The weights, one a part, are a
softmax of learned numbers or fixed.

Weights of absent parts (``missing: allow``) go to the others in proportion.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.models.fusion.base import softmax_over_present
from mmmoe_pretrain.models.fusion.modulation import Additive, AdditiveSettings


class LateSettings(AdditiveSettings):
    """``weights``: by part, of any sum; None: learned, equal at the start."""

    kind: Literal["late"] = "late"
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> LateSettings:
        if self.weights is not None and set(self.weights) != set(self.parts):
            raise ValueError(
                f"weights {self.weights} are not of the parts {', '.join(self.parts)}; give one to each, or leave "
                f"weights out to learn them"
            )
        return self


class Late(Additive):
    """See the module."""

    Settings = LateSettings

    def __init__(self, settings: LateSettings, model: ModelConfig) -> None:
        super().__init__(settings, model)
        self.names = settings.parts
        self.learned, fixed = settings.weights is None, settings.weights or {}
        if self.learned:
            self.parts = nn.ParameterDict({name: nn.Parameter(torch.zeros(1)) for name in self.names})
        logs = torch.tensor([math.log(fixed.get(name, 1.0)) for name in self.names])
        self.register_buffer("fixed_P", logs, persistent=False)

    def terms(self, mean_PBD: Tensor, present_PB: Tensor) -> Tensor:
        logit_P = self.get_buffer("fixed_P")
        if self.learned:
            logit_P = torch.cat([self.parts[name] for name in self.names])
        weight_PB = softmax_over_present(logit_P[:, None].expand(present_PB.shape), present_PB)
        return weight_PB[:, :, None] * mean_PBD
