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
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmmoe_pretrain.batch import AttentionBlocks

VARLEN_TYPES = (torch.bfloat16, torch.float16)
VARLEN_HEAD_SIZES = range(8, 257, 8)
# Spans share a call if their lengths round up to the same multiple of this. A span has at most 7 rows of padding,
# which cost little on any machine, and of each kind there is at most one call for every 8 tokens of the longest
# span. Forward and backward, CPU ms on one core of an AMD EPYC with AVX-512, 4 heads of 32 in fp32, by multiples of
# 1, 8 and 32, and in the ladder 8, 16, 24, 32, 48, 64, 96, ...: images, clips and short texts 5.4, 4.3, 7.4, 4.5;
# captions of 20 to 64 tokens 34, 33, 40, 36; documents of 100 to 1,000 tokens 75, 75, 75, 85
# (benchmarks/RESULTS.md). A choice by measuring at run time would change the order of sums, and so their last
# digits, from run to run.
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
    ``place_n``: where the output of a token is computed. ``prefix_p`` are the tokens that are also in a causal span,
    there at ``place_p``. If ``in_order``, the rows are the tokens of the stream in order."""

    buckets: tuple[Bucket, ...]
    in_order: bool
    row_N: Tensor
    place_n: Tensor
    prefix_p: Tensor
    place_p: Tensor


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
        block_S, causal_S = _spans(self.length_S, self.full_S)
        start_S = (np.cumsum(self.length_S) - self.length_S)[block_S]
        full_S = self.full_S[block_S]
        length_S = np.where(causal_S, self.length_S[block_S], full_S)
        first_B = np.flatnonzero(np.diff(_bucket_keys(length_S, causal_S), prepend=-1))  # of each bucket
        spans_B = np.diff(first_B, append=len(block_S))
        longest_B = np.maximum.reduceat(length_S, first_B) if len(first_B) else first_B
        padded_S = np.repeat(longest_B, spans_B)

        span_N = np.repeat(np.arange(len(block_S)), padded_S)
        within_N = np.arange(len(span_N)) - np.repeat(np.cumsum(padded_S) - padded_S, padded_S)
        valid_N = within_N < length_S[span_N]
        row_N = start_S[span_N] + np.minimum(within_N, length_S[span_N] - 1)
        counts_N = valid_N & ((within_N >= full_S[span_N]) | ~causal_S[span_N])
        place_n = np.empty(self.length_S.sum(), dtype=np.int64)
        place_n[row_N[counts_N]] = np.flatnonzero(counts_N)
        place_p = np.flatnonzero(valid_N & ~counts_N)

        masks = np.split(valid_N, np.cumsum(spans_B * longest_B)[:-1])
        buckets = tuple(map(self._bucket, spans_B.tolist(), longest_B.tolist(), causal_S[first_B].tolist(), masks))
        in_order = np.array_equal(row_N, np.arange(len(place_n)))
        return Buckets(buckets, in_order, *map(self._tensor, (row_N, place_n, row_N[place_p], place_p)))

    @functools.cached_property
    def varlen(self) -> Varlen:
        length_S, full_S = self.length_S, self.full_S
        end_S = np.cumsum(length_S)
        has_rest_S = full_S < length_S
        calls = []
        for causal, kept_S, counts_S in ((False, full_S, full_S > 0), (True, length_S * has_rest_S, has_rest_S)):
            if counts_S.any():
                of = slice(np.flatnonzero(counts_S)[0], np.flatnonzero(counts_S)[-1] + 1)
                sequences = _sequences(kept_S[of], length_S[of])
                ends = self._tensor(np.cumsum([0, *sequences], dtype=np.int32))
                first, last = int(end_S[of][0] - length_S[of][0]), int(end_S[of][-1])
                calls.append(VarlenCall(first, last, ends, int(sequences.max()), causal))
        within_n = np.arange(length_S.sum()) - np.repeat(end_S - length_S, length_S)
        return Varlen(tuple(calls), self._tensor(within_n >= np.repeat(full_S, length_S)))

    def _bucket(self, spans: int, length: int, causal: bool, valid: np.ndarray) -> Bucket:
        needs_mask = not causal and not valid.all()
        mask_S11L = self._tensor(valid.reshape(spans, 1, 1, length)) if needs_mask else None
        return Bucket(spans, length, causal, mask_S11L)

    def _tensor(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self.device)


def attend(q_nHd: Tensor, k_nGd: Tensor, v_nGd: Tensor, plan: AttentionPlan) -> Tensor:
    """Queries [n, H, d], keys and values [n, G, d] -> [n, H d]. Query head h reads key head h // (H / G)."""
    if q_nHd.shape[0] == 0:
        return q_nHd.flatten(1)
    if _varlen_fits(q_nHd):
        return attend_varlen(q_nHd, k_nGd, v_nGd, plan.varlen)
    return attend_buckets(q_nHd, k_nGd, v_nGd, plan.buckets)


def attend_buckets(q_nHd: Tensor, k_nGd: Tensor, v_nGd: Tensor, plan: Buckets) -> Tensor:
    """See ``attend``."""
    laid_out = (q_nHd, k_nGd, v_nGd) if plan.in_order else _IntoBuckets.apply(q_nHd, k_nGd, v_nGd, plan)
    if len(plan.buckets) == 1:  # of long blocks, say: no copy
        out_NHd = _attend_bucket(plan.buckets[0], *laid_out)
    else:
        sizes = [bucket.spans * bucket.length for bucket in plan.buckets]
        parts = zip(*(x.split(sizes) for x in laid_out), strict=True)
        out_NHd = torch.cat([_attend_bucket(bucket, *qkv) for bucket, qkv in zip(plan.buckets, parts, strict=True)])
    return (out_NHd if plan.in_order else _OutOfBuckets.apply(out_NHd, plan.place_n)).flatten(1)


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

    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # not in each torch since 2.11
            options["enable_gqa"] = True
        else:
            k, v = _repeat_heads(q, k), _repeat_heads(q, v)
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


def _spans(length_S: np.ndarray, full_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The block and the kind (causal or not) of each span of blocks of these lengths, ordered by bucket."""
    bidirectional, causal = np.flatnonzero(full_S > 0), np.flatnonzero(full_S < length_S)
    block_S = np.concatenate([bidirectional, causal])
    causal_S = np.arange(len(block_S)) >= len(bidirectional)
    keys_S = _bucket_keys(np.concatenate([full_S[bidirectional], length_S[causal]]), causal_S)
    order = np.argsort(keys_S, kind="stable")
    return block_S[order], causal_S[order]


def _bucket_keys(length_S: np.ndarray, causal_S: np.ndarray) -> np.ndarray:
    """Equal for spans that share a call."""
    return -(-length_S // LENGTH_MULTIPLE) * 2 + causal_S


def _sequences(kept_S: np.ndarray, length_S: np.ndarray) -> np.ndarray:
    """Lengths of sequences that make up blocks of ``length_S``: the first ``kept_S`` tokens of each in one, and the
    others, whose rows are discarded, in chunks, which cost little for any length of the block."""
    rest_S = length_S - kept_S
    chunks_S = -(-rest_S // DISCARDED_CHUNK)
    counts_S = 1 + chunks_S
    block_Q = np.repeat(np.arange(len(length_S)), counts_S)
    chunk_Q = np.arange(len(block_Q)) - np.repeat(np.cumsum(counts_S) - counts_S, counts_S) - 1  # -1: what is kept
    discarded_Q = np.minimum(DISCARDED_CHUNK, rest_S[block_Q] - chunk_Q * DISCARDED_CHUNK)
    lengths = np.where(chunk_Q < 0, kept_S[block_Q], discarded_Q)
    return lengths[lengths > 0]


def _attend_bucket(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows of one bucket [S L, H or G, d] -> [S L, H, d]."""
    shares_heads = q.shape[1] != k.shape[1]
    if shares_heads and q.device.type != "cpu":  # there no kernel but FlashAttention, for half types, can share them
        k, v, shares_heads = _repeat_heads(q, k), _repeat_heads(q, v), False
    q, k, v = (x.unflatten(0, (bucket.spans, bucket.length)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bucket.mask_S11L, is_causal=bucket.causal, enable_gqa=shares_heads
    )
    return out.transpose(1, 2).flatten(0, 1)


def _repeat_heads(q: Tensor, kv: Tensor) -> Tensor:
    return kv.repeat_interleave(q.shape[1] // kv.shape[1], dim=1)


class _IntoBuckets(torch.autograd.Function):
    """Each of [n, ., d] -> [N, ., d]. A gather back is the gradient: it is faster than the scatter that
    ``index_select`` would make, and deterministic on GPUs. Outputs of padding and of prefixes in causal spans are
    discarded, so that gradients are zero at padding everywhere, and at such prefixes for queries."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Buckets) -> tuple[Tensor, ...]:
        ctx.plan = plan
        return tuple(x.index_select(0, plan.row_N) for x in (q, k, v))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        of_q, *of_kv = (grad.index_select(0, plan.place_n) for grad in grads)
        if plan.prefix_p.numel():
            for of, grad in zip(of_kv, grads[1:], strict=True):
                of.index_add_(0, plan.prefix_p, grad.index_select(0, plan.place_p))
        return of_q, *of_kv, None


class _OutOfBuckets(torch.autograd.Function):
    """[N, H, d] -> [n, H, d]. No two tokens have one place: their gradients are copied, not added."""

    @staticmethod
    def forward(ctx: Any, out_NHd: Tensor, place_n: Tensor) -> Tensor:
        ctx.place_n, ctx.rows = place_n, out_NHd.shape[0]
        return out_NHd.index_select(0, place_n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nHd: Tensor) -> tuple[Tensor, None]:
        grad_NHd = grad_nHd.new_zeros(ctx.rows, *grad_nHd.shape[1:])
        return grad_NHd.index_copy_(0, ctx.place_n, grad_nHd), None
