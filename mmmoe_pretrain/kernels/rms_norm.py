"""RMSNorm forward and backward in one pass each; replaces ``models.block.rms_norm``.

Shapes: t rows, D their width. A program reads whole rows, so D is at most some ten thousand.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 16  # of a program of the backward pass, which sums the weight's gradient over them


@triton.jit
def forward_kernel(x, weight, out, scale, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values) / size + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, values * factor * gain, mask=inside)
    tl.store(scale + row, factor)


@triton.jit
def backward_kernel(
    grad, x, weight, scale, grad_x, grad_weight, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    gain = tl.load(weight + columns, mask=columns < size, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        start, inside = row * size, (columns < size) & (row < rows)
        factor = tl.load(scale + row, mask=row < rows, other=0.0)
        unit = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32) * factor
        of_out = tl.load(grad + start + columns, mask=inside, other=0.0).to(tl.float32)
        total += of_out * unit
        of_unit = of_out * gain
        of_x = factor * (of_unit - unit * (tl.sum(of_unit * unit) / size))
        tl.store(grad_x + start + columns, of_x, mask=inside)
    tl.store(grad_weight + program * size + columns, total, mask=columns < size)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        rows, size = x_tD.shape
        out_tD, scale_t = torch.empty_like(x_tD), x_tD.new_empty(rows, dtype=torch.float32)
        if rows:
            block = triton.next_power_of_2(size)
            forward_kernel[(rows,)](x_tD, weight_D, out_tD, scale_t, size, eps, BLOCK=block, num_warps=_warps(block))
        ctx.save_for_backward(x_tD, weight_D, scale_t)
        return out_tD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tD: Tensor) -> tuple[Tensor, Tensor, None]:
        x_tD, weight_D, scale_t = ctx.saved_tensors
        rows, size = x_tD.shape
        if not rows:
            return torch.empty_like(x_tD), torch.zeros_like(weight_D), None
        grad_x_tD = torch.empty_like(x_tD)
        parts = x_tD.new_empty(triton.cdiv(rows, ROWS), size, dtype=torch.float32)
        block = triton.next_power_of_2(size)
        backward_kernel[(parts.shape[0],)](
            grad_tD.contiguous(), x_tD, weight_D, scale_t, grad_x_tD, parts, rows, size,
            ROWS=ROWS, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return grad_x_tD, parts.sum(0).to(weight_D.dtype), None


def _warps(block: int) -> int:
    return min(16, max(1, block // 256))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D], [D] -> [..., D] in the type of x."""
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps).view(x.shape)
