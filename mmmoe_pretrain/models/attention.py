"""Self-attention that is block-diagonal over the segments of a packed stream.

Shapes: n valid tokens, D hidden size, H heads of this rank (tensor parallelism cuts them), d head size, h half of
it, t rows of this rank (n, or under sequence parallelism its share of them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain import kernels
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.models.attend import AttentionPlan, attend
from mmmoe_pretrain.moe.tokens import TokenInfo, token_info
from mmmoe_pretrain.parallel.cuts import tensor_share
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.tensor import column_linear, pad_rows, row_linear

EPS = torch.finfo(torch.float32).eps  # of the norms of queries and keys, in whatever type they come


@dataclass(frozen=True)
class StreamPlan:
    """What every block needs of a batch, worked out once."""

    tokens: TokenInfo
    cos_nh: Tensor
    sin_nh: Tensor
    attention: AttentionPlan

    @property
    def num_valid(self) -> int:
        return self.tokens.num_tokens


def plan_stream(batch: Batch, head_size: int, base: float, rotary_M: Tensor, draw: int = 0) -> StreamPlan:
    """``rotary_M`` is True for the modalities whose positions are rotary (RoFormer, arXiv
    2104.09864); tokens of the others are not rotated. ``draw``: see ``TokenInfo``."""
    tokens = token_info(batch, draw)
    num_valid, device = tokens.num_tokens, tokens.modality_ids_n.device
    half = head_size // 2
    frequency_h = base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    position_n = batch.positions[:num_valid] * rotary_M.to(device)[tokens.modality_ids_n]
    angle_nh = position_n[:, None].float() * frequency_h
    return StreamPlan(
        tokens,
        angle_nh.cos(),
        angle_nh.sin(),
        AttentionPlan(batch.segments, device),
    )


class Attention(nn.Module):
    """Multi-head attention with rotary positions; queries and keys are normalised per head."""

    def __init__(self, hidden_size: int, num_heads: int, groups: Groups = SINGLE) -> None:
        super().__init__()
        self.groups = groups
        self.num_heads = tensor_share(num_heads, groups)
        self.head_size = hidden_size // num_heads
        self.qkv = column_linear(hidden_size, 3 * hidden_size, groups, blocks=3)
        self.out = row_linear(hidden_size, hidden_size, groups)
        self.prepare = prepare_heads  # or the same compiled: models/compiling.py

    def forward(self, x_tD: Tensor, plan: StreamPlan) -> Tensor:
        """[t, D] -> [t, D]."""
        qkv = self.qkv(x_tD)[: plan.num_valid].view(plan.num_valid, 3, self.num_heads, self.head_size)
        mixed = attend(*self.prepare(qkv, plan.cos_nh, plan.sin_nh), plan.attention)
        return self.out(pad_rows(mixed, self.groups))


def prepare_heads(qkv_n3Hd: Tensor, cos_nh: Tensor, sin_nh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[n, 3, H, d] -> queries and keys, normalised and rotated, and values, [n, H, d] each."""
    if kernels.usable(qkv_n3Hd):
        from mmmoe_pretrain.kernels import heads

        return heads.prepare_heads(qkv_n3Hd, cos_nh, sin_nh, EPS)
    q, k, v = qkv_n3Hd.unbind(1)
    return _rotate(_unit(q), cos_nh, sin_nh), _rotate(_unit(k), cos_nh, sin_nh), v


def _unit(x_nHd: Tensor) -> Tensor:
    return F.rms_norm(x_nHd, x_nHd.shape[-1:], eps=EPS)


def _rotate(x_nHd: Tensor, cos_nh: Tensor, sin_nh: Tensor) -> Tensor:
    cos, sin = cos_nh[:, None].to(x_nHd.dtype), sin_nh[:, None].to(x_nHd.dtype)
    a, b = x_nHd.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
