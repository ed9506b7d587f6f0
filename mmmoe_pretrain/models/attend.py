"""Attention within the segments of a packed stream, by one of two ways with the same result.

On a GPU, in half precision: ``torch.nn.attention.varlen.varlen_attn``, FlashAttention over sequences of unlike
length that lie one behind the other; nothing is padded and no mask exists. Elsewhere: segments of similar length
are padded to one length and attended to together with a mask, one call a bucket.

A segment with a prefix takes two calls of ``varlen_attn`` over the rows as they lie: one in which prefix and rest
are segments of their own and attend in full, which is right for the prefix; and one in which the whole segment is
causal, which is right for the rest. Each computes some rows in vain, but neither gathers any.

Shapes: n tokens, H heads, d head size, S segments (of a bucket), L their padded length.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.batch import Segments

VARLEN_TYPES = (torch.bfloat16, torch.float16)
VARLEN_HEAD_SIZES = range(8, 257, 8)


@dataclass(frozen=True)
class Bucket:
    """Segments of similar length. ``rows_SL``: where each token stands in the stream (padding points at row 0).
    ``mask_SLL``: True where a query may attend to a key; padding attends to itself alone, so that no row of the
    softmax is empty."""

    rows_SL: Tensor
    mask_SLL: Tensor
    valid_SL: Tensor


@dataclass(frozen=True)
class Varlen:
    """What ``varlen_attn`` is told: where segments begin and end, and the longest. ``causal_from``: the first row
    of the second call. ``causal_n``: its rows that count."""

    full_ends: Tensor
    full_longest: int
    causal_from: int
    causal_ends: Tensor
    causal_longest: int
    causal_n: Tensor


class AttentionPlan:
    """The segments of one microbatch as attention needs them; made once, used by every block."""

    def __init__(self, segments: Segments, device: torch.device) -> None:
        self.length_S = np.asarray(segments.lengths, dtype=np.int64)
        self.prefix_S = np.asarray(segments.prefixes, dtype=np.int64)
        self.device = device

    @functools.cached_property
    def buckets(self) -> tuple[tuple[Bucket, ...], Tensor]:
        """The buckets, and where each token [n] stands in the concatenation of them."""
        length_S, prefix_S = self.length_S, self.prefix_S
        start_S = np.cumsum(length_S) - length_S
        padded_S = bucket_length(length_S)
        buckets = []
        for prefixed in (False, True):
            for padded in np.unique(padded_S[(prefix_S > 0) == prefixed]):
                of = np.flatnonzero(((prefix_S > 0) == prefixed) & (padded_S == padded))
                start_S1, length_S1, prefix_S1 = (self._column(x[of]) for x in (start_S, length_S, prefix_S))
                buckets.append(_bucket(start_S1, length_S1, prefix_S1, int(padded), prefixed))
        return tuple(buckets), _place_in_buckets(buckets, int(length_S.sum()), self.device)

    @functools.cached_property
    def varlen(self) -> Varlen:
        length_S, prefix_S = self.length_S, self.prefix_S
        prefixed = np.flatnonzero(prefix_S > 0)
        tail = int(prefixed[0]) if prefixed.size else len(length_S)
        parts = np.stack([prefix_S, length_S - prefix_S], axis=1).reshape(-1)
        parts = parts[parts > 0]
        of_tail, prefix_of_tail = length_S[tail:], prefix_S[tail:]
        within = np.arange(of_tail.sum()) - np.repeat(np.cumsum(of_tail) - of_tail, of_tail)
        causal = (within >= np.repeat(prefix_of_tail, of_tail)) & np.repeat(prefix_of_tail > 0, of_tail)
        return Varlen(
            self._ends(parts),
            int(parts.max(initial=0)),
            int(length_S[:tail].sum()),
            self._ends(of_tail),
            int(of_tail.max(initial=0)),
            torch.from_numpy(causal).to(self.device),
        )

    def _ends(self, lengths: np.ndarray) -> Tensor:
        return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(self.device)

    def _column(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.device)[:, None]


def attend(q_nHd: Tensor, k_nHd: Tensor, v_nHd: Tensor, plan: AttentionPlan) -> Tensor:
    """Queries, keys and values [n, H, d] -> [n, H d]."""
    if q_nHd.shape[0] == 0:
        return v_nHd.flatten(1)
    if _varlen_fits(q_nHd):
        return attend_varlen(q_nHd, k_nHd, v_nHd, plan.varlen)
    return attend_buckets(q_nHd, k_nHd, v_nHd, *plan.buckets)


def attend_buckets(
    q_nHd: Tensor, k_nHd: Tensor, v_nHd: Tensor, buckets: tuple[Bucket, ...], place_n: Tensor
) -> Tensor:
    """See ``attend``."""
    qkv_nHd = torch.cat([q_nHd, k_nHd, v_nHd], dim=-1)  # one gather a bucket serves all three
    parts = [_attend_bucket(qkv_nHd, bucket) for bucket in buckets]
    return torch.cat(parts).index_select(0, place_n)


def attend_varlen(q_nHd: Tensor, k_nHd: Tensor, v_nHd: Tensor, varlen: Varlen) -> Tensor:
    """See ``attend``."""
    ends, longest = varlen.full_ends, varlen.full_longest
    out_nHd = _varlen_attn(q_nHd, k_nHd, v_nHd, ends, longest, causal=False)
    first = varlen.causal_from
    if first < q_nHd.shape[0]:
        ends, longest = varlen.causal_ends, varlen.causal_longest
        causal_nHd = _varlen_attn(q_nHd[first:], k_nHd[first:], v_nHd[first:], ends, longest, causal=True)
        tail_nHd = torch.where(varlen.causal_n[:, None, None], causal_nHd, out_nHd[first:])
        out_nHd = torch.cat([out_nHd[:first], tail_nHd])
    return out_nHd.flatten(1)


def _varlen_attn(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, causal: bool) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # seconds to import; CPUs never call it

    out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0 if causal else -1))
    assert isinstance(out, Tensor)
    return out


def _varlen_fits(q_nHd: Tensor) -> bool:
    """FlashAttention's kernels want compute capability 8.0. AMD's GPUs, whose type is "cuda" too, take the buckets:
    ``varlen_attn`` has not been tried there."""
    return (
        q_nHd.device.type == "cuda"
        and torch.version.hip is None
        and q_nHd.dtype in VARLEN_TYPES
        and q_nHd.shape[-1] in VARLEN_HEAD_SIZES
        and torch.cuda.get_device_capability(q_nHd.device) >= (8, 0)
    )


def bucket_length(lengths: np.ndarray) -> np.ndarray:
    """The least of 8, 16, 24, 32, 48, 64, 96, 128, ... that is not below each length."""
    ladder = [8, 16, 24]
    while ladder[-1] < lengths.max(initial=1):
        ladder.append(ladder[-2] * 2)
    return np.asarray(ladder)[np.searchsorted(ladder, lengths)]


def _bucket(start_S1: Tensor, length_S1: Tensor, prefix_S1: Tensor, padded: int, prefixed: bool) -> Bucket:
    place_L = torch.arange(padded, device=start_S1.device)
    valid_SL = place_L < length_S1
    mask_SLL = valid_SL[:, :, None] & valid_SL[:, None, :]
    if prefixed:
        causal_LL = place_L[None, :] <= place_L[:, None]
        mask_SLL &= causal_LL | (place_L < prefix_S1)[:, None, :]
    mask_SLL |= torch.eye(padded, dtype=torch.bool, device=start_S1.device)
    return Bucket(torch.where(valid_SL, start_S1 + place_L, 0), mask_SLL, valid_SL)


def _place_in_buckets(buckets: list[Bucket], num_tokens: int, device: torch.device) -> Tensor:
    place = torch.empty(num_tokens + 1, dtype=torch.int64, device=device)  # last: where padding lands
    start = 0
    for bucket in buckets:
        rows = torch.where(bucket.valid_SL, bucket.rows_SL, num_tokens).reshape(-1)
        place[rows] = torch.arange(start, start + rows.numel(), device=device)
        start += rows.numel()
    return place[:num_tokens]


def _attend_bucket(qkv_nHd: Tensor, bucket: Bucket) -> Tensor:
    segments, length = bucket.rows_SL.shape
    gathered = qkv_nHd.index_select(0, bucket.rows_SL.reshape(-1))
    gathered = gathered.view(segments, length, *qkv_nHd.shape[1:]).transpose(1, 2)
    q, k, v = gathered.chunk(3, dim=-1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.mask_SLL[:, None])
    return out.transpose(1, 2).reshape(segments * length, -1)
