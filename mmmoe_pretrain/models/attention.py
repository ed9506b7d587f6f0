"""Self-attention that is block-diagonal over the segments of a packed stream.

Segments of similar length are attended to together, one call a bucket: the path that runs on
every device. Shapes: n valid tokens, D hidden size, H heads, d head size, S segments of one
bucket, L its padded length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.batch import AttentionBucket, Batch
from mmmoe_pretrain.moe.tokens import TokenInfo, token_info


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

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_nD: Tensor, plan: StreamPlan) -> Tensor:
        """[n, D] -> [n, D]."""
        num_valid, hidden = x_nD.shape
        head_size = hidden // self.num_heads
        q, k, v = self.qkv(x_nD).view(num_valid, 3, self.num_heads, head_size).unbind(1)
        q, k = _rotate(_unit(q), plan), _rotate(_unit(k), plan)
        qkv = torch.cat([q, k, v], dim=-1)  # [n, H, 3d]: one gather a bucket serves all three
        parts = [_attend(qkv, bucket) for bucket in plan.buckets]
        mixed = torch.cat(parts) if parts else qkv[..., :head_size].reshape(0, hidden)
        return self.out(mixed.index_select(0, plan.place_n))


def _unit(x_nHd: Tensor) -> Tensor:
    return F.rms_norm(x_nHd, x_nHd.shape[-1:])


def _rotate(x_nHd: Tensor, plan: StreamPlan) -> Tensor:
    cos, sin = plan.cos_nh[:, None].to(x_nHd.dtype), plan.sin_nh[:, None].to(x_nHd.dtype)
    a, b = x_nHd.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def _attend(qkv_nHd: Tensor, bucket: AttentionBucket) -> Tensor:
    segments, length = bucket.rows_SL.shape
    gathered = qkv_nHd.index_select(0, bucket.rows_SL.reshape(-1))
    gathered = gathered.view(segments, length, *qkv_nHd.shape[1:]).transpose(1, 2)
    q, k, v = gathered.chunk(3, dim=-1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.mask_SLL[:, None])
    return out.transpose(1, 2).reshape(segments * length, -1)
