"""RMSNorm forward and backward in one pass each; replaces ``models.block.rms_norm``, and with a branch of a residual
stream the sum before it.

With a branch the forward pass writes the sum and its normalised rows. The backward pass adds the gradient that the
sum gets from elsewhere, also without a branch. That is one [t, D] less forward, and two less backward.

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
def forward_kernel(x, branch, weight, total, out, scale, size, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(branch + row * size + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * size + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    factor = tl.rsqrt(tl.sum(values * values) / size + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, values * factor * gain, mask=inside)
    tl.store(scale + row, factor)


@triton.jit
def backward_kernel(
    grad, grad_total, x, weight, scale, grad_x, grad_weight, rows, size, ADDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    gain = tl.load(weight + columns, mask=columns < size, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        row = program * ROWS + i
        start, inside = row * size, (columns < size) & (row < rows)
        factor = tl.load(scale + row, mask=row < rows, other=0.0)
        unit = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32) * factor
        of_out = tl.load(grad + start + columns, mask=inside, other=0.0).to(tl.float32)
        sums += of_out * unit
        of_unit = of_out * gain
        of_x = factor * (of_unit - unit * (tl.sum(of_unit * unit) / size))
        if ADDS:
            of_x += tl.load(grad_total + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + start + columns, of_x, mask=inside)
    tl.store(grad_weight + program * size + columns, sums, mask=columns < size)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_tD: Tensor, branch_tD: Tensor | None, weight_D: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        rows, size = x_tD.shape
        total_tD = x_tD if branch_tD is None else torch.empty_like(x_tD)
        out_tD, scale_t = torch.empty_like(x_tD), x_tD.new_empty(rows, dtype=torch.float32)
        if rows:
            block = triton.next_power_of_2(size)
            forward_kernel[(rows,)](
                x_tD, branch_tD, weight_D, None if branch_tD is None else total_tD, out_tD, scale_t, size, eps,
                ADDS=branch_tD is not None, BLOCK=block, num_warps=_warps(block),
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.has_branch = branch_tD is not None
        ctx.save_for_backward(total_tD, weight_D, scale_t)
        return total_tD, out_tD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total_tD: Tensor | None, grad_tD: Tensor | None) -> tuple[Tensor | None, ...]:
        x_tD, weight_D, scale_t = ctx.saved_tensors
        rows, size = x_tD.shape
        if grad_tD is None or not rows:
            grad_x_tD = torch.zeros_like(x_tD) if grad_total_tD is None else grad_total_tD
            return grad_x_tD, grad_x_tD if ctx.has_branch else None, torch.zeros_like(weight_D), None
        grad_x_tD = torch.empty_like(x_tD)
        parts = x_tD.new_empty(triton.cdiv(rows, ROWS), size, dtype=torch.float32)
        block = triton.next_power_of_2(size)
        backward_kernel[(parts.shape[0],)](
            grad_tD.contiguous(), None if grad_total_tD is None else grad_total_tD.contiguous(), x_tD, weight_D,
            scale_t, grad_x_tD, parts, rows, size,
            ADDS=grad_total_tD is not None, ROWS=ROWS, BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
        return grad_x_tD, grad_x_tD if ctx.has_branch else None, parts.sum(0).to(weight_D.dtype), None


def _warps(block: int) -> int:
    return min(16, max(1, block // 256))


def add_rms_norm(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """[..., D], the same or none, [D] -> their sum [..., D] (``x`` without a branch) and its normalised rows."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    added = None if branch is None else branch.reshape(-1, x.shape[-1]).contiguous()
    total, out = _RMSNorm.apply(rows, added, weight, eps)
    return total.view(x.shape), out.view(x.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D], [D] -> [..., D] in the type of x."""
    return add_rms_norm(x, None, weight, eps)[1]
