"""Gated fusion: the Gated Multimodal Unit (GMU, arXiv 1702.01992). For part p with pooled vector x_p

    h_p = tanh(W_p x_p),  z_p = weight of p by V_p [x_1; ...; x_P],  h = sum over p of z_p * h_p  (elementwise).

The z_p are a softmax over the parts, for each number of h: of two parts that is the paper's z and 1 - z with
z = sigmoid((V_1 - V_2) [x_1; x_2]). For more parts the paper takes a sigmoid each, which does not add up to one.

An absent part (``missing: allow``) is zero in the input of the gates, and the softmax is over the present ones.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.models.fusion.base import softmax_over_present
from mmmoe_pretrain.models.fusion.modulation import Additive, AdditiveSettings


class GatedSettings(AdditiveSettings):
    kind: Literal["gated"] = "gated"


class Gated(Additive):
    """See the module."""

    Settings = GatedSettings

    def __init__(self, settings: GatedSettings, model: ModelConfig) -> None:
        super().__init__(settings, model)
        self.names = settings.parts
        self.parts = nn.ModuleDict({name: _Part(model.hidden_size, len(self.names)) for name in self.names})

    def terms(self, mean_PBD: Tensor, present_PB: Tensor) -> Tensor:
        everything = mean_PBD.transpose(0, 1).flatten(1)
        of_parts = [self.parts[name](mean_BD, everything) for name, mean_BD in zip(self.names, mean_PBD, strict=True)]
        hidden, logits = (torch.stack(tensors) for tensors in zip(*of_parts, strict=True))
        return softmax_over_present(logits, present_PB) * hidden


class _Part(nn.Module):
    def __init__(self, hidden_size: int, num_parts: int) -> None:
        super().__init__()
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate = nn.Linear(num_parts * hidden_size, hidden_size, bias=False)

    def forward(self, mean_BD: Tensor, everything: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.value(mean_BD)), self.gate(everything)
