"""SwiGLU times the routing weight of its row, forward and backward; replaces ``moe.activation.swiglu`` and the
product behind it. The backward pass computes the result again for the weight's gradient, so that it need not live on;
``backward`` writes it out for an expert's second product, too.

Shapes: A rows, F hidden size of an expert; gate and up stand side by side in [A, 2F].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024  # columns at a time


@triton.jit
def forward_kernel(up, weights, out, size, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(up + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * value
    if WEIGHTED:
        h *= tl.load(weights + row).to(tl.float32)
    tl.store(out + row * size + column, h, mask=inside)


@triton.jit
def backward_kernel(
    grad, up, weights, grad_up, grad_weights, out, size: tl.constexpr, WEIGHTED: tl.constexpr, WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < size
        gate = tl.load(up + row * 2 * size + column, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(up + row * 2 * size + size + column, mask=inside, other=0.0).to(tl.float32)
        of_h = tl.load(grad + row * size + column, mask=inside, other=0.0).to(tl.float32)
        chance = tl.sigmoid(gate)
        activated = gate * chance
        h = activated * value
        if WEIGHTED:
            weight = tl.load(weights + row).to(tl.float32)
            total += of_h * h
            of_h *= weight
            h *= weight
        if WRITES:
            tl.store(out + row * size + column, h, mask=inside)
        of_gate = of_h * value * (chance + activated * (1.0 - chance))
        tl.store(grad_up + row * 2 * size + column, of_gate, mask=inside)
        tl.store(grad_up + row * 2 * size + size + column, of_h * activated, mask=inside)
    if WEIGHTED:
        tl.store(grad_weights + row, tl.sum(total))


def forward(up_AF: Tensor, weights_A: Tensor | None) -> Tensor:
    """[A, 2F], weights [A] or none -> [A, F]. No gradient."""
    rows, size = up_AF.shape[0], up_AF.shape[1] // 2
    out_AF = up_AF.new_empty(rows, size)
    if rows:
        grid = (rows, triton.cdiv(size, BLOCK))
        forward_kernel[grid](up_AF, weights_A, out_AF, size, WEIGHTED=weights_A is not None, BLOCK=BLOCK)
    return out_AF


def backward(
    grad_AF: Tensor, up_AF: Tensor, weights_A: Tensor | None, out_AF: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """The gradients of ``up_AF`` and the weights; ``out_AF`` gets what ``forward`` returned, and may be
    ``grad_AF``."""
    rows, size = up_AF.shape[0], up_AF.shape[1] // 2
    grad_up = torch.empty_like(up_AF)
    grad_weights = None if weights_A is None else torch.empty_like(weights_A)
    if rows:
        backward_kernel[(rows,)](
            grad_AF.contiguous(), up_AF, weights_A, grad_up, grad_weights, out_AF, size,
            WEIGHTED=weights_A is not None, WRITES=out_AF is not None, BLOCK=BLOCK,
        )  # fmt: skip
    return grad_up, grad_weights


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, up_AF: Tensor, weights_A: Tensor | None) -> Tensor:
        ctx.save_for_backward(up_AF, weights_A)
        return forward(up_AF, weights_A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_AF: Tensor) -> tuple[Tensor, Tensor | None]:
        return backward(grad_AF, *ctx.saved_tensors)


def swiglu(up_AF: Tensor, weights_A: Tensor | None = None) -> Tensor:
    """[A, 2F], weights [A] or none -> [A, F] in the type of ``up_AF``."""
    return _SwiGLU.apply(up_AF.contiguous(), None if weights_A is None else weights_A.contiguous())
