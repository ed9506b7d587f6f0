"""Expert computation on a CPU, and for types and shapes that ``grouped_mm`` does not support: one expert after
another.

A block of an expert's rows is gathered, multiplied, activated and multiplied while it is in the cache. Each expert
has the weight layout of torch.nn.Linear, which is faster with few rows (measured, 16 rows in bf16: 163 GFLOP/s
against 103 for the first product, 223 against 128 for its weight gradient). Routing weights need no extra pass:
forward they are part of the sum over a row's experts, backward they multiply the gathered gradient, which is the
narrowest tensor there is.

With ``recompute`` no tensor of the width of the first product is kept: the backward pass multiplies it again, piece
by piece, with the same arithmetic and so the same result (in SwiGLU 2/9 more of it).

Shapes: as in ``expert_math.py``; P assignments with padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.moe.cpu import activation
from mmmoe_pretrain.moe.cpu.buffers import Buffers
from mmmoe_pretrain.moe.cpu.matmul import matmul, matmul_into
from mmmoe_pretrain.moe.cpu.padding import pad_plan
from mmmoe_pretrain.moe.cpu.threads import ROWS_FOR_ALL_THREADS, run_side_by_side
from mmmoe_pretrain.moe.expert_math import ExpertStack
from mmmoe_pretrain.moe.plan import ExpertPlan

BLOCK_BYTES = 16 << 20  # of a piece's widest tensor: malloc recycles that size, and weight gradients are few sums


def blocked(x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan, stack: ExpertStack) -> Tensor:
    """See ``ExpertMath``."""
    if plan.unused_A is not None:
        plan = plan.without_unused()
        weights_A = weights_A[: plan.num_assignments]
    keep = torch.is_grad_enabled() and not stack.recompute  # gradients are never enabled inside the function
    return _Blocked.apply(x_mD, weights_A, stack.up_EFD, stack.down_EDF, stack.up_bias_EF, plan, stack, keep)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_mD: Tensor,
        weights_A: Tensor,
        up_EFD: Tensor,
        down_EDF: Tensor,
        up_bias_EF: Tensor | None,
        plan: ExpertPlan,
        stack: ExpertStack,
        keep: bool,
    ) -> Tensor:
        buffers, products = stack.buffers, stack.cpu_config.products
        pad = x_mD.device.type == "cpu" and x_mD.dtype is not torch.float64
        padded = pad_plan(plan, weights_A.detach(), _most_rows(up_EFD), pad)
        rows = padded.plan.rows_A.split(padded.lengths)
        y_PD = _rows(padded.plan.num_assignments, x_mD, buffers)
        ups, downs, biases = up_EFD.unbind(), down_EDF.unbind(), _biases(up_bias_EF, x_mD.dtype, len(up_EFD))
        kept = [x_mD] * len(padded.pieces)

        def compute(index: int) -> None:
            piece = padded.pieces[index]
            x = x_mD.index_select(0, rows[index])
            up = _first_product(x, ups[piece.expert], biases[piece.expert], products)
            h = activation.forward(stack.activation, up)
            matmul_into(y_PD[piece.start : piece.end], h, downs[piece.expert].t(), products)
            if keep:
                kept[index] = up

        run_side_by_side(compute, padded.lengths, x_mD.device, _rows_for_all_threads(stack.cpu_config))
        ctx.padded, ctx.activation, ctx.buffers, ctx.cpu_config = padded, stack.activation, buffers, stack.cpu_config
        ctx.save_for_backward(x_mD, up_EFD, down_EDF, up_bias_EF, y_PD, *(kept if keep else ()))
        return padded.plan.sum_by_row(y_PD, padded.weights_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mD: Tensor) -> tuple[Tensor | None, ...]:
        x_mD, up_EFD, down_EDF, up_bias_EF, y_PD, *kept = ctx.saved_tensors
        padded, buffers, products = ctx.padded, ctx.buffers, ctx.cpu_config.products
        pieces_of: dict[int, list[int]] = {}
        counts = [0] * up_EFD.shape[0]
        for index, piece in enumerate(padded.pieces):
            pieces_of.setdefault(piece.expert, []).append(index)
            counts[piece.expert] += piece.end - piece.start
        rows = padded.plan.rows_A.split(padded.lengths)
        scale_P1 = padded.weights_P.to(x_mD.dtype)[:, None]
        ups, downs, biases = up_EFD.unbind(), down_EDF.unbind(), _biases(up_bias_EF, x_mD.dtype, len(up_EFD))
        needs_up, needs_down, needs_bias = ctx.needs_input_grad[2:5]  # False where the weights are frozen
        grad_x_PD = _rows(padded.plan.num_assignments, x_mD, buffers)
        grad_weights_P = torch.empty_like(padded.weights_P)
        grad_up = _gradients_of(up_EFD, counts, buffers) if needs_up else None
        grad_down = _gradients_of(down_EDF, counts, buffers) if needs_down else None
        grad_bias = torch.zeros_like(up_bias_EF) if needs_bias else None

        def one_expert(e: int) -> None:
            into_up = _Accumulator(None if grad_up is None else grad_up[e], products)
            into_down = _Accumulator(None if grad_down is None else grad_down[e], products)
            for index in pieces_of[e]:
                here = slice(padded.pieces[index].start, padded.pieces[index].end)
                grad_y = grad_mD.index_select(0, rows[index])
                grad_weights_P[here] = (grad_y * y_PD[here]).sum(-1, dtype=grad_weights_P.dtype)
                grad_y.mul_(scale_P1[here])  # and so padding is 0 from here on
                x = x_mD.index_select(0, rows[index])
                up = kept[index] if kept else _first_product(x, ups[e], biases[e], products)
                h, grad = activation.backward(ctx.activation, matmul(grad_y, downs[e], products), up)
                into_down.add_product(grad_y.t(), h)
                into_up.add_product(grad.t(), x)
                if grad_bias is not None:
                    grad_bias[e] += grad.sum(0, dtype=grad_bias.dtype)
                matmul_into(grad_x_PD[here], grad, ups[e], products)
            into_up.close()
            into_down.close()

        busy = list(pieces_of)
        lengths = [counts[e] for e in busy]
        run_side_by_side(lambda i: one_expert(busy[i]), lengths, x_mD.device, _rows_for_all_threads(ctx.cpu_config))
        grad_weights_A = grad_weights_P.index_select(0, padded.position_A)
        return padded.plan.sum_by_row(grad_x_PD), grad_weights_A, grad_up, grad_down, grad_bias, None, None, None


class _Accumulator:
    """Sums products into ``out``, if it is not None; in fp32 where several would be rounded to a half type in
    between."""

    def __init__(self, out: Tensor | None, products: str) -> None:
        self.out, self.products, self.count = out, products, 0
        self.wide: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        if self.out is None:
            return
        self.count += 1
        if self.count == 1:
            matmul_into(self.out, a, b, self.products)
        elif self.out.dtype.itemsize >= 4:
            self.out += matmul(a, b, self.products)
        else:
            if self.wide is None:
                self.wide = self.out.float()
            self.wide += matmul(a, b, self.products)

    def close(self) -> None:
        if self.out is not None and self.wide is not None:
            self.out.copy_(self.wide)


def _rows_for_all_threads(settings: CpuConfig) -> int:
    rows = settings.rows_for_all_threads
    return ROWS_FOR_ALL_THREADS if rows is None else rows


def _first_product(x_nD: Tensor, up_FD: Tensor, bias_F: Tensor | None, products: str) -> Tensor:
    up_nF = matmul(x_nD, up_FD.t(), products)
    return up_nF if bias_F is None else up_nF.add_(bias_F)


def _biases(up_bias_EF: Tensor | None, dtype: torch.dtype, experts: int) -> Sequence[Tensor | None]:
    return [None] * experts if up_bias_EF is None else up_bias_EF.to(dtype).unbind()


def _most_rows(up_EFD: Tensor) -> int:
    return max(256, BLOCK_BYTES // (up_EFD.shape[1] * up_EFD.element_size()))


def _gradients_of(weight: Tensor, counts: list[int], buffers: Buffers) -> Tensor:
    """A buffer for the gradient of stacked weights, zero where an expert had no rows."""
    out = buffers.empty(tuple(weight.shape), weight.dtype, weight.device)
    for e, count in enumerate(counts):
        if count == 0:
            out[e].zero_()
    return out


def _rows(count: int, like: Tensor, buffers: Buffers) -> Tensor:
    return buffers.empty((count, like.shape[1]), like.dtype, like.device)
