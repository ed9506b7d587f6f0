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
from mmmoe_pretrain.batch import AttentionBlocks, Batch
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.models.attend import AttentionPlan, attend
from mmmoe_pretrain.models.cache import KeyValueCache
from mmmoe_pretrain.moe.tokens import TokenInfo, token_info
from mmmoe_pretrain.parallel.cuts import tensor_share
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.tensor import column_linear, pad_rows, row_linear

EPS = torch.finfo(torch.float32).eps  # of the norms of queries and keys of any type


@dataclass(frozen=True)
class StreamPlan:
    """Data of a batch that every block needs, computed once. ``cache``: where keys and values are kept, in
    generation."""

    tokens: TokenInfo
    cos_nh: Tensor
    sin_nh: Tensor
    attention: AttentionPlan
    cache: KeyValueCache | None = None

    @property
    def num_valid(self) -> int:
        return self.tokens.num_tokens


@dataclass(frozen=True)
class Rotary:
    """Rotary positions (RoFormer, arXiv 2104.09864). ``rotary_M`` is True for the modalities whose positions are
    rotary; tokens of the others are not rotated."""

    head_size: int
    base: float
    rotary_M: Tensor

    def angles(self, position_n: Tensor, modality_ids_n: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [n, h]."""
        half, device = self.head_size // 2, position_n.device
        frequency_h = self.base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
        position_n = position_n * self.rotary_M.to(device)[modality_ids_n]
        angle_nh = position_n[:, None].float() * frequency_h
        return angle_nh.cos(), angle_nh.sin()


def plan_stream(
    batch: Batch, names: StreamNames, rotary: Rotary, draw: int = 0, cache: KeyValueCache | None = None
) -> StreamPlan:
    """``draw``: see ``TokenInfo``."""
    tokens = token_info(batch, names, draw)
    angles = rotary.angles(batch.positions[: tokens.num_tokens], tokens.modality_ids_n)
    return StreamPlan(tokens, *angles, AttentionPlan(batch.attention, tokens.modality_ids_n.device), cache)


def plan_append(tokens: TokenInfo, position_S: Tensor, rotary: Rotary, cache: KeyValueCache) -> StreamPlan:
    """Of one more token for every sequence of ``cache``."""
    alone = AttentionPlan(AttentionBlocks((), ()), position_S.device)  # the cache has what they attend to
    return StreamPlan(tokens, *rotary.angles(position_S, tokens.modality_ids_n), alone, cache)


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
        prepared = self.prepare(heads, self.num_kv_heads, plan.cos_nh, plan.sin_nh)
        if plan.cache is None:
            mixed = attend(*prepared, plan.attention)
        else:
            mixed = plan.cache.attend(self, *prepared, plan.attention)
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
