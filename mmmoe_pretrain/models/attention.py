"""Self-attention that is block-diagonal over the segments of a packed stream.

Segments of similar length are attended to together, one call a bucket: the path that runs on
every device. Shapes: n valid tokens, D hidden size, H heads of this rank (tensor parallelism cuts
them), d head size, S segments of one bucket, L its padded length, t rows of this rank (n, or under
sequence parallelism its share of them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.batch import AttentionBucket, Batch
from mmmoe_pretrain.moe.tokens import TokenInfo, token_info
from mmmoe_pretrain.parallel.cuts import tensor_share
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.tensor import column_linear, pad_rows, row_linear


@dataclass(frozen=True)
class StreamPlan:
    """What every block needs of a batch, worked out once: ``place_n`` is where each token
    stands in the concatenation of the padded buckets."""

    tokens: TokenInfo
    cos_nh: Tensor
    sin_nh: Tensor
    buckets: tuple[AttentionBucket, ...]
    place_n: Tensor

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
        batch.buckets,
        _place_in_buckets(batch.buckets, num_valid, device),
    )


def _place_in_buckets(buckets: tuple[AttentionBucket, ...], num_valid: int, device: torch.device) -> Tensor:
    place = torch.empty(num_valid + 1, dtype=torch.int64, device=device)  # last: where padding lands
    start = 0
    for bucket in buckets:
        rows = torch.where(bucket.valid_SL, bucket.rows_SL, num_valid).reshape(-1)
        place[rows] = torch.arange(start, start + rows.numel(), device=device)
        start += rows.numel()
    return place[:num_valid]


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
        qkv = self.prepare(qkv, plan.cos_nh, plan.sin_nh)  # [n, H, 3d]: one gather a bucket serves all three
        parts = [_attend(qkv, bucket) for bucket in plan.buckets]
        mixed = torch.cat(parts) if parts else qkv[..., : self.head_size].flatten(1)  # no bucket: no token
        return self.out(pad_rows(mixed.index_select(0, plan.place_n), self.groups))


def prepare_heads(qkv_n3Hd: Tensor, cos_nh: Tensor, sin_nh: Tensor) -> Tensor:
    """[n, 3, H, d] -> [n, H, 3d]: queries and keys normalised and rotated, and values, side by side."""
    q, k, v = qkv_n3Hd.unbind(1)
    return torch.cat([_rotate(_unit(q), cos_nh, sin_nh), _rotate(_unit(k), cos_nh, sin_nh), v], dim=-1)


def _unit(x_nHd: Tensor) -> Tensor:
    return F.rms_norm(x_nHd, x_nHd.shape[-1:])


def _rotate(x_nHd: Tensor, cos_nh: Tensor, sin_nh: Tensor) -> Tensor:
    cos, sin = cos_nh[:, None].to(x_nHd.dtype), sin_nh[:, None].to(x_nHd.dtype)
    a, b = x_nHd.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _attend(qkv_nHd: Tensor, bucket: AttentionBucket) -> Tensor:
    segments, length = bucket.rows_SL.shape
    gathered = qkv_nHd.index_select(0, bucket.rows_SL.reshape(-1))
    gathered = gathered.view(segments, length, *qkv_nHd.shape[1:]).transpose(1, 2)
    q, k, v = gathered.chunk(3, dim=-1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.mask_SLL[:, None])
    return out.transpose(1, 2).reshape(segments * length, -1)
