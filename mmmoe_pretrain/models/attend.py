"""Attention within the blocks of a packed stream, by one of two backends with the same result, without a mask of L x
L.

A block is computed as up to two *spans*: its first ``full`` tokens, which attend in both directions, and, where
tokens follow them, the whole block causally, of which only the rows after ``full`` count. The prefix's rows of the
second are discarded; for that price every span is a plain call, bidirectional or causal.

On a GPU, in half precision: ``torch.nn.attention.varlen.varlen_attn``, FlashAttention over concatenated sequences of
different lengths, one call for each kind of span. Elsewhere: spans of similar length are stacked in a bucket, one
call of ``scaled_dot_product_attention`` each. On CPUs that is torch's flash kernel in every type, with and without
the masks below, so that memory grows in a straight line with the length.

Shapes: n tokens, H heads of queries, G of keys and values (grouped-query attention, arXiv 2305.13245: G divides H),
d head size, S spans (of a bucket), L their padded length, N rows of all buckets.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.batch import AttentionBlocks, send

VARLEN_TYPES = (torch.bfloat16, torch.float16)
VARLEN_HEAD_SIZES = range(8, 257, 8)
# Spans share a call if their lengths round up to the same multiple of this. A span has at most 7 rows of padding,
# and of each kind there is at most one call for every 8 tokens of the longest span. Of the multiples 1, 8 and 32, and
# a geometric ladder, 8 was the fastest on CPUs (benchmarks/RESULTS.md). A choice by measuring at run time would
# change the order of sums, and so their last digits, from run to run.
LENGTH_MULTIPLE = 8
DISCARDED_CHUNK = 128  # longest sequence whose rows are discarded; FlashAttention computes about as many at once


@dataclass(frozen=True)
class Bucket:
    """``spans`` spans padded at their ends to ``length``, the longest. ``mask_S11L``: True for keys that are not
    padding; None where none is needed, as in causal spans, whose tokens never attend to later ones."""

    spans: int
    length: int
    causal: bool
    mask_S11L: Tensor | None


@dataclass(frozen=True)
class Buckets:
    """The concatenated buckets. ``row_N``: the token of each row (padding repeats the last one of its span).
    ``place_n``: where the output of a token is computed. If ``in_order``, the rows are the tokens of the stream in
    order."""

    buckets: tuple[Bucket, ...]
    in_order: bool
    row_N: Tensor
    place_n: Tensor


@dataclass(frozen=True)
class VarlenCall:
    """The sequences of one call of ``varlen_attn``: rows ``first`` to ``last`` of the stream, where sequences begin
    and end among them, and the longest."""

    first: int
    last: int
    ends: Tensor
    longest: int
    causal: bool


@dataclass(frozen=True)
class Varlen:
    """One or two calls; ``causal_n``: True for the tokens whose output comes from the causal one."""

    calls: tuple[VarlenCall, ...]
    causal_n: Tensor


class AttentionPlan:
    """The blocks of one microbatch as attention needs them; made once, used by every block of the trunk."""

    def __init__(self, blocks: AttentionBlocks, device: torch.device) -> None:
        self.length_S = np.asarray(blocks.lengths, dtype=np.int64)
        self.full_S = np.asarray(blocks.full, dtype=np.int64)
        assert ((self.full_S >= 0) & (self.full_S <= self.length_S)).all(), (self.length_S, self.full_S)
        self.device = device

    @functools.cached_property
    def buckets(self) -> Buckets:
        """Spans lie by bucket, short ones first, and in a bucket in the order of the stream."""
        spans: dict[tuple[int, bool], list[tuple[int, int, int]]] = defaultdict(list)
        start_S = np.cumsum(self.length_S) - self.length_S
        for start, length, full in zip(start_S.tolist(), self.length_S.tolist(), self.full_S.tolist(), strict=True):
            if full > 0:
                spans[-(-full // LENGTH_MULTIPLE), False].append((start, full, 0))
            if full < length:
                spans[-(-length // LENGTH_MULTIPLE), True].append((start, length, full))
        buckets, rows, counts = [], [], []
        for (_, causal), of_bucket in sorted(spans.items()):
            start_S1, length_S1, discarded_S1 = np.array(of_bucket).T[:, :, None]
            within_L = np.arange(length_S1.max())
            valid_SL = within_L < length_S1
            rows.append((start_S1 + np.minimum(within_L, length_S1 - 1)).ravel())
            counts.append((valid_SL & (within_L >= discarded_S1)).ravel())
            mask_S11L = None if causal or valid_SL.all() else self._tensor(valid_SL[:, None, None])
            buckets.append(Bucket(len(of_bucket), len(within_L), causal, mask_S11L))
        row_N, counts_N = np.concatenate(rows), np.concatenate(counts)
        place_n = np.empty(self.length_S.sum(), dtype=np.int64)
        place_n[row_N[counts_N]] = np.flatnonzero(counts_N)
        in_order = np.array_equal(row_N, np.arange(len(place_n)))
        return Buckets(tuple(buckets), in_order, self._tensor(row_N), self._tensor(place_n))

    @functools.cached_property
    def varlen(self) -> Varlen:
        length_S, full_S, calls = self.length_S, self.full_S, []
        for causal, kept_S in ((False, full_S), (True, np.where(full_S < length_S, length_S, 0))):
            used = np.flatnonzero(kept_S)
            if len(used):
                of = slice(used[0], used[-1] + 1)
                sequences = _sequences(kept_S[of].tolist(), length_S[of].tolist())
                ends = self._tensor(np.cumsum([0, *sequences], dtype=np.int32))
                first = int(length_S[: used[0]].sum())
                calls.append(VarlenCall(first, first + sum(sequences), ends, max(sequences), causal))
        within_n = np.arange(length_S.sum()) - np.repeat(np.cumsum(length_S) - length_S, length_S)
        return Varlen(tuple(calls), self._tensor(within_n >= np.repeat(full_S, length_S)))

    def _tensor(self, numbers: np.ndarray) -> Tensor:
        return send(torch.from_numpy(numbers), self.device)


def attend(q_nHd: Tensor, k_nGd: Tensor, v_nGd: Tensor, plan: AttentionPlan) -> Tensor:
    """Queries [n, H, d], keys and values [n, G, d] -> [n, H d]. Query head h reads key head h // (H / G)."""
    if q_nHd.shape[0] == 0:
        return q_nHd.flatten(1)
    if _varlen_fits(q_nHd):
        return attend_varlen(q_nHd, k_nGd, v_nGd, plan.varlen)
    return attend_buckets(q_nHd, k_nGd, v_nGd, plan.buckets)


def attend_buckets(q_nHd: Tensor, k_nGd: Tensor, v_nGd: Tensor, plan: Buckets) -> Tensor:
    """See ``attend``."""
    laid_out: tuple[Tensor, ...] = (q_nHd, k_nGd, v_nGd)
    if not plan.in_order:
        # On GPUs too the gradient does not depend on the order of its sums: of the rows of a token at most two have a
        # gradient (a prefix that is also in a causal span), since that of padding is zero.
        laid_out = tuple(x.index_select(0, plan.row_N) for x in laid_out)
    if len(plan.buckets) == 1:  # of long blocks, say: no copy
        out_NHd = _attend_bucket(plan.buckets[0], *laid_out)
    else:
        sizes = [bucket.spans * bucket.length for bucket in plan.buckets]
        parts = zip(*(x.split(sizes) for x in laid_out), strict=True)
        out_NHd = torch.cat([_attend_bucket(bucket, *qkv) for bucket, qkv in zip(plan.buckets, parts, strict=True)])
    return (out_NHd if plan.in_order else out_NHd.index_select(0, plan.place_n)).flatten(1)


def attend_varlen(q_nHd: Tensor, k_nGd: Tensor, v_nGd: Tensor, plan: Varlen) -> Tensor:
    """See ``attend``. Rows lie as they are; those that a call computes and discards form short sequences there."""
    outs = []
    for call in plan.calls:
        out = _varlen_attn(call, *(x[call.first : call.last] for x in (q_nHd, k_nGd, v_nGd)))
        around = call.first, q_nHd.shape[0] - call.last
        outs.append(F.pad(out, (0, 0, 0, 0, *around)) if any(around) else out)
    out_nHd = outs[0] if len(outs) == 1 else torch.where(plan.causal_n[:, None, None], outs[1], outs[0])
    return out_nHd.flatten(1)


def _varlen_attn(call: VarlenCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # seconds to import; CPUs never call it

    options: dict[str, Any] = {} if q.shape[1] == k.shape[1] else {"enable_gqa": True}  # torch 2.11 lacks it
    window = (-1, 0 if call.causal else -1)
    out = varlen_attn(q, k, v, call.ends, call.ends, call.longest, call.longest, window_size=window, **options)
    assert isinstance(out, Tensor)
    return out


def _varlen_fits(q_nHd: Tensor) -> bool:
    """FlashAttention needs compute capability 8.0. AMD's GPUs, whose type is "cuda" too, use the buckets:
    ``varlen_attn`` is not tested there."""
    return (
        q_nHd.device.type == "cuda"
        and torch.version.hip is None
        and q_nHd.dtype in VARLEN_TYPES
        and q_nHd.shape[-1] in VARLEN_HEAD_SIZES
        and torch.cuda.get_device_capability(q_nHd.device) >= (8, 0)
    )


def _sequences(kept: list[int], lengths: list[int]) -> list[int]:
    """Lengths of sequences that make up blocks of ``lengths``: the first ``kept`` tokens of each in one, and the
    others, whose rows are discarded, in chunks, which cost little for any length of the block."""
    sequences = []
    for first, length in zip(kept, lengths, strict=True):
        chunks, last = divmod(length - first, DISCARDED_CHUNK)
        sequences += [first, *[DISCARDED_CHUNK] * chunks, last]
    return [length for length in sequences if length]


def _attend_bucket(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows of one bucket [S L, H or G, d] -> [S L, H, d]."""
    k, v, shares_heads = heads_that_fit(q, k, v)
    q, k, v = (x.unflatten(0, (bucket.spans, bucket.length)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bucket.mask_S11L, is_causal=bucket.causal, enable_gqa=shares_heads
    )
    return out.transpose(1, 2).flatten(0, 1)


def heads_that_fit(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Keys and values [_, H or G, ...] as a call with the queries [_, H, ...] can take them, and whether heads of
    queries share them in it."""
    shares_heads = q.shape[1] != k.shape[1]
    if shares_heads and q.device.type != "cpu":  # there no kernel but FlashAttention, for half types, can share them
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        shares_heads = False
    return k, v, shares_heads
