"""The decoder of masked modelling whose hidden tokens are not in the stream (MAE, arXiv 2111.06377).

Of a hidden token it knows the place alone, as a learned vector, which attends to the tokens of its segment that the
trunk has computed. Hidden tokens do not attend to each other (CrossMAE, arXiv 2401.14391).

It is on the last pipeline stage in fp32, as fusion modules are, and equal on every tensor rank.

Shapes: n tokens of the stream, N hidden tokens of a modality, C numbers of a token's content, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.batch import Contents
from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.models.attention import EPS
from mmmoe_pretrain.models.fusion.base import PARTS
from mmmoe_pretrain.models.fusion.cross import CrossBlock, plan_cross, tokens_of


class _Part(nn.Module):
    """What is of one modality: a vector for each place, and the numbers of a token."""

    def __init__(self, max_tokens: int, hidden_size: int, content_size: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.empty(max_tokens, hidden_size))
        self.head = nn.Linear(hidden_size, content_size)


class ContentDecoder(nn.Module):
    """``num_layers`` blocks of cross-attention for the hidden tokens of ``modalities``."""

    def __init__(self, num_layers: int, modalities: Mapping[str, Modality], model: ModelConfig) -> None:
        super().__init__()
        size = model.hidden_size
        self.blocks = nn.ModuleList(CrossBlock(size, model.num_heads) for _ in range(num_layers))
        parts = {name: _Part(its.max_tokens, size, its.content_size) for name, its in modalities.items()}
        setattr(self, PARTS, nn.ModuleDict(parts))

    def forward(self, x_nD: Tensor, name: str, contents: Contents) -> Tensor:
        """[N, C] predictions of the ``contents`` of modality ``name``, which have ``seen``."""
        assert contents.seen is not None
        part = getattr(self, PARTS)[name]
        hidden_ND = part.positions.index_select(0, contents.rows)
        seen_kD, lengths = tokens_of(x_nD, [contents.seen.spans])
        plan = plan_cross(contents.seen.counts, lengths, x_nD.device)
        for block in self.blocks:
            hidden_ND = block(hidden_ND, seen_kD, plan)
        predicted: Tensor = part.head(F.rms_norm(hidden_ND, hidden_ND.shape[-1:], eps=EPS))
        return predicted
