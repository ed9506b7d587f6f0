"""Self-attention that is block-diagonal over a packed stream.

Shapes: n valid tokens, D hidden size, H heads of queries of this rank (tensor parallelism cuts them), G its heads of
keys and values, d head size, h half of it, t rows of this rank (n, or under sequence parallelism its share of them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain import kernels
from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.models.attend import AttentionPlan, attend
from mmmoe_pretrain.moe.tokens import TokenInfo, token_info
from mmmoe_pretrain.parallel.cuts import tensor_share
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.tensor import column_linear, pad_rows, row_linear

EPS = torch.finfo(torch.float32).eps  # of the norms of queries and keys of any type


@dataclass(frozen=True)
class StreamPlan:
    """Data of a batch that every block needs, computed once."""

    tokens: TokenInfo
    cos_nh: Tensor
    sin_nh: Tensor
    attention: AttentionPlan

    @property
    def num_valid(self) -> int:
        return self.tokens.num_tokens


def plan_stream(
    batch: Batch, names: StreamNames, head_size: int, base: float, rotary_M: Tensor, draw: int = 0
) -> StreamPlan:
    """``rotary_M`` is True for the modalities whose positions are rotary (RoFormer, arXiv
    2104.09864); tokens of the others are not rotated. ``draw``: see ``TokenInfo``."""
    tokens = token_info(batch, names, draw)
    num_valid, device = tokens.num_tokens, tokens.modality_ids_n.device
    half = head_size // 2
    frequency_h = base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    position_n = batch.positions[:num_valid] * rotary_M.to(device)[tokens.modality_ids_n]
    angle_nh = position_n[:, None].float() * frequency_h
    return StreamPlan(tokens, angle_nh.cos(), angle_nh.sin(), AttentionPlan(batch.attention, device))


class Attention(nn.Module):
    """Multi-head attention with rotary positions; queries and keys are normalised per head. With fewer heads of keys
    and values each serves ``num_heads / num_kv_heads`` heads of queries (grouped queries, arXiv 2305.13245)."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, groups: Groups = SINGLE) -> None:
        super().__init__()
        self.groups = groups
        self.num_heads, self.num_kv_heads = tensor_share(num_heads, groups), tensor_share(num_kv_heads, groups)
        self.head_size = hidden_size // num_heads
        rows = (num_heads + 2 * num_kv_heads) * self.head_size  # queries, then keys, then values
        self.qkv = column_linear(hidden_size, rows, groups, blocks=(num_heads // num_kv_heads, 1, 1))
        self.out = row_linear(hidden_size, hidden_size, groups)
        self.prepare = prepare_heads  # or the same compiled: models/compiling.py

    def forward(self, x_tD: Tensor, plan: StreamPlan) -> Tensor:
        """[t, D] -> [t, D]."""
        qkv = self.qkv(x_tD)
        if qkv.shape[0] > plan.num_valid:  # else no slice, whose gradient would be copied
            qkv = qkv[: plan.num_valid]
        heads = qkv.unflatten(1, (-1, self.head_size))
        mixed = attend(*self.prepare(heads, self.num_kv_heads, plan.cos_nh, plan.sin_nh), plan.attention)
        return self.out(pad_rows(mixed, self.groups))


def prepare_heads(
    qkv_nAd: Tensor, num_kv_heads: int, cos_nh: Tensor, sin_nh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """[n, H + 2 G, d] -> queries [n, H, d] and keys [n, G, d], normalised and rotated, and values [n, G, d]."""
    if kernels.usable(qkv_nAd):
        from mmmoe_pretrain.kernels import heads

        return heads.prepare_heads(qkv_nAd, num_kv_heads, cos_nh, sin_nh, EPS)
    num_heads = qkv_nAd.shape[1] - 2 * num_kv_heads
    q, k, v = qkv_nAd.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    return _rotate(_unit(q), cos_nh, sin_nh), _rotate(_unit(k), cos_nh, sin_nh), v


def _unit(x_nHd: Tensor) -> Tensor:
    return F.rms_norm(x_nHd, x_nHd.shape[-1:], eps=EPS)


def _rotate(x_nHd: Tensor, cos_nh: Tensor, sin_nh: Tensor) -> Tensor:
    cos, sin = cos_nh[:, None].to(x_nHd.dtype), sin_nh[:, None].to(x_nHd.dtype)
    a, b = x_nHd.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
