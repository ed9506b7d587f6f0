"""Queries and keys normalised per head and rotated, in one pass; replaces ``models.attention.prepare_heads``.

The backward pass starts from the rotated queries and keys, which attention keeps anyway: turned back they are
the normalised ones, so that the projection's output need not live on.

Shapes: n tokens, H heads of queries, G of keys and values, d head size (even), h = d / 2. One program computes the
queries, keys or values (``part`` 0, 1 or 2) of a token.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def forward_kernel(
    qkv, cos, sin, q, k, v, scale, q_heads, kv_heads, half, eps, HEADS: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.where(part == 0, q_heads, kv_heads)
    before = tl.where(part == 0, 0, q_heads + (part - 1) * kv_heads)  # heads in front of this part's
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    first = head * (2 * half) + column  # of a head's two halves, which are rotated into each other
    source = qkv + (token * (q_heads + 2 * kv_heads) + before) * 2 * half + first
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    target = token * heads * 2 * half + first
    if part == 2:
        tl.store(v + target, a, mask=inside)
        tl.store(v + target + half, b, mask=inside)
    else:
        factor = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * half) + eps)
        scales = scale + token * (q_heads + kv_heads) + before + tl.arange(0, HEADS)
        tl.store(scales, factor, mask=tl.arange(0, HEADS) < heads)
        a, b = a * factor[:, None], b * factor[:, None]
        c = tl.load(cos + token * half + column, mask=column < half, other=0.0)
        s = tl.load(sin + token * half + column, mask=column < half, other=0.0)
        if part == 0:
            tl.store(q + target, a * c - b * s, mask=inside)
            tl.store(q + target + half, a * s + b * c, mask=inside)
        else:
            tl.store(k + target, a * c - b * s, mask=inside)
            tl.store(k + target + half, a * s + b * c, mask=inside)


@triton.jit
def backward_kernel(
    grad_q, grad_k, grad_v, q, k, cos, sin, scale, grad_qkv, q_heads, kv_heads, half,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads = tl.where(part == 0, q_heads, kv_heads)
    before = tl.where(part == 0, 0, q_heads + (part - 1) * kv_heads)
    head, column = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (head < heads) & (column < half)
    first = head * (2 * half) + column
    target = grad_qkv + (token * (q_heads + 2 * kv_heads) + before) * 2 * half + first
    source = token * heads * 2 * half + first
    if part == 2:
        tl.store(target, tl.load(grad_v + source, mask=inside), mask=inside)
        tl.store(target + half, tl.load(grad_v + source + half, mask=inside), mask=inside)
    else:
        if part == 0:
            of_a = tl.load(grad_q + source, mask=inside, other=0.0).to(tl.float32)
            of_b = tl.load(grad_q + source + half, mask=inside, other=0.0).to(tl.float32)
            a = tl.load(q + source, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(q + source + half, mask=inside, other=0.0).to(tl.float32)
        else:
            of_a = tl.load(grad_k + source, mask=inside, other=0.0).to(tl.float32)
            of_b = tl.load(grad_k + source + half, mask=inside, other=0.0).to(tl.float32)
            a = tl.load(k + source, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(k + source + half, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(cos + token * half + column, mask=column < half, other=0.0)
        s = tl.load(sin + token * half + column, mask=column < half, other=0.0)
        of_a, of_b = of_a * c + of_b * s, of_b * c - of_a * s
        a, b = a * c + b * s, b * c - a * s
        scales = scale + token * (q_heads + kv_heads) + before + tl.arange(0, HEADS)
        factor = tl.load(scales, mask=tl.arange(0, HEADS) < heads, other=0.0)
        mean = tl.sum(of_a * a + of_b * b, axis=1) / (2 * half)
        tl.store(target, factor[:, None] * (of_a - a * mean[:, None]), mask=inside)
        tl.store(target + half, factor[:, None] * (of_b - b * mean[:, None]), mask=inside)


class _PrepareHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv_nAd: Tensor, num_kv_heads: int, cos_nh: Tensor, sin_nh: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, in_all, size = qkv_nAd.shape
        num_heads = in_all - 2 * num_kv_heads
        q, k, v = (qkv_nAd.new_empty(tokens, count, size) for count in (num_heads, num_kv_heads, num_kv_heads))
        scale = cos_nh.new_empty(tokens, num_heads + num_kv_heads)
        if tokens:
            forward_kernel[(tokens, 3)](
                qkv_nAd, cos_nh, sin_nh, q, k, v, scale, num_heads, num_kv_heads, size // 2, eps,
                **_blocks(num_heads, size),
            )  # fmt: skip
        ctx.save_for_backward(q, k, cos_nh, sin_nh, scale)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, None, None, None, None]:
        q, k, cos_nh, sin_nh, scale = ctx.saved_tensors
        (tokens, num_heads, size), num_kv_heads = q.shape, k.shape[1]
        grad_qkv = q.new_empty(tokens, num_heads + 2 * num_kv_heads, size)
        if tokens:
            grads = (grad.contiguous() for grad in (grad_q, grad_k, grad_v))
            backward_kernel[(tokens, 3)](
                *grads, q, k, cos_nh, sin_nh, scale, grad_qkv, num_heads, num_kv_heads, size // 2,
                **_blocks(num_heads, size),
            )  # fmt: skip
        return grad_qkv, None, None, None, None


def _blocks(heads: int, size: int) -> dict[str, int]:
    return {"HEADS": triton.next_power_of_2(heads), "HALF": triton.next_power_of_2(size // 2), "num_warps": 4}


def prepare_heads(
    qkv_nAd: Tensor, num_kv_heads: int, cos_nh: Tensor, sin_nh: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[n, H + 2 G, d] and the cosines and sines [n, h] in fp32 -> queries [n, H, d], keys and values [n, G, d]."""
    return _PrepareHeads.apply(qkv_nAd.contiguous(), num_kv_heads, cos_nh.contiguous(), sin_nh.contiguous(), eps)
