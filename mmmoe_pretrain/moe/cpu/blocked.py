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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmmoe_pretrain.moe.cpu.activation import KERNELS, ActivationKernels
from mmmoe_pretrain.moe.cpu.buffers import Buffers
from mmmoe_pretrain.moe.cpu.matmul import matmul, matmul_into
from mmmoe_pretrain.moe.cpu.padding import Piece, pad_plan
from mmmoe_pretrain.moe.cpu.threads import run_side_by_side
from mmmoe_pretrain.moe.expert_math import ExpertStack
from mmmoe_pretrain.moe.plan import ExpertPlan

BLOCK_BYTES = 16 << 20  # of a piece's widest tensor: malloc recycles that size, and weight gradients are few sums


def blocked(x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan, stack: ExpertStack) -> Tensor:
    """See ``ExpertMath``."""
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
        kernels, buffers = KERNELS[stack.activation], stack.buffers
        pad = x_mD.device.type == "cpu" and x_mD.dtype is not torch.float64
        padded = pad_plan(plan, weights_A.detach(), _most_rows(up_EFD), pad)
        rows = padded.plan.rows_A.split(padded.lengths)
        y_PD = _rows_with_zero(padded.plan.num_assignments, x_mD, buffers)
        ups, downs = up_EFD.unbind(), down_EDF.unbind()
        biases = _biases(up_bias_EF, x_mD)
        kept = [x_mD] * len(padded.pieces)

        def compute(index: int) -> None:
            piece = padded.pieces[index]
            up = matmul(x_mD.index_select(0, rows[index]), ups[piece.expert].t())
            if biases is not None:
                up += biases[piece.expert]
            matmul_into(y_PD[piece.start : piece.end], kernels.forward(up), downs[piece.expert].t())
            if keep:
                kept[index] = up

        run_side_by_side(compute, padded.lengths, x_mD.device)
        ctx.padded, ctx.kernels, ctx.buffers = padded, kernels, buffers
        ctx.save_for_backward(x_mD, up_EFD, down_EDF, up_bias_EF, y_PD, *(kept if keep else ()))
        return padded.plan.sum_by_row(y_PD, padded.weights_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mD: Tensor) -> tuple[Tensor | None, ...]:
        x_mD, up_EFD, down_EDF, up_bias_EF, y_PD, *kept = ctx.saved_tensors
        padded = ctx.padded
        first_products = kept or [None] * len(padded.pieces)
        counts = [0] * up_EFD.shape[0]
        for piece in padded.pieces:
            counts[piece.expert] += piece.end - piece.start
        needs_up, needs_down, needs_bias = ctx.needs_input_grad[2:5]
        task = _Backward(
            x_mD=x_mD,
            y_PD=y_PD,
            scale_P1=padded.weights_P.to(x_mD.dtype)[:, None],
            ups=up_EFD.unbind(),
            downs=down_EDF.unbind(),
            biases=_biases(up_bias_EF, x_mD),
            kernels=ctx.kernels,
            grad_mD=grad_mD,
            grad_x_PD=_rows_with_zero(padded.plan.num_assignments, x_mD, ctx.buffers),
            grad_weights_P=torch.empty_like(padded.weights_P),
            grad_up=_gradients_of(up_EFD, counts, ctx.buffers) if needs_up else None,
            grad_down=_gradients_of(down_EDF, counts, ctx.buffers) if needs_down else None,
            grad_bias=torch.zeros_like(up_bias_EF) if needs_bias else None,
        )
        work: dict[int, list[tuple[Piece, Tensor, Tensor | None]]] = {}
        rows_of = padded.plan.rows_A.split(padded.lengths)
        for piece, rows, up in zip(padded.pieces, rows_of, first_products, strict=True):
            work.setdefault(piece.expert, []).append((piece, rows, up))
        busy = list(work)
        run_side_by_side(lambda i: task.expert(busy[i], work[busy[i]]), [counts[e] for e in busy], x_mD.device)
        grad_x_mD = padded.plan.sum_by_row(task.grad_x_PD)
        grad_weights_A = task.grad_weights_P.index_select(0, padded.position_A)
        return grad_x_mD, grad_weights_A, task.grad_up, task.grad_down, task.grad_bias, None, None, None


@dataclass(frozen=True)
class _Backward:
    """The backward pass of all experts; ``expert`` writes one expert's part of the gradients."""

    x_mD: Tensor
    y_PD: Tensor
    scale_P1: Tensor
    ups: tuple[Tensor, ...]
    downs: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] | None
    kernels: ActivationKernels
    grad_mD: Tensor
    grad_x_PD: Tensor
    grad_weights_P: Tensor
    grad_up: Tensor | None  # None where the weights are frozen
    grad_down: Tensor | None
    grad_bias: Tensor | None

    def expert(self, e: int, pieces: list[tuple[Piece, Tensor, Tensor | None]]) -> None:
        """``pieces``: with the rows that each computes on, and the forward pass's first product if kept."""
        into_up, into_down = (None if w is None else _Accumulator(w[e]) for w in (self.grad_up, self.grad_down))
        for piece, rows, up in pieces:
            here = slice(piece.start, piece.end)
            grad_y = self.grad_mD.index_select(0, rows)
            self.grad_weights_P[here] = (grad_y * self.y_PD[here]).sum(-1, dtype=self.grad_weights_P.dtype)
            grad_y.mul_(self.scale_P1[here])  # and so padding is 0 from here on
            x = None
            if up is None:
                x = self.x_mD.index_select(0, rows)
                up = matmul(x, self.ups[e].t())
                if self.biases is not None:
                    up += self.biases[e]
            h, grad = self.kernels.backward(matmul(grad_y, self.downs[e]), up)
            if into_down is not None:
                into_down.add_product(grad_y.t(), h)
            if into_up is not None:
                into_up.add_product(grad.t(), self.x_mD.index_select(0, rows) if x is None else x)
            if self.grad_bias is not None:
                self.grad_bias[e] += grad.sum(0, dtype=self.grad_bias.dtype)
            matmul_into(self.grad_x_PD[here], grad, self.ups[e])
        for accumulator in (into_up, into_down):
            if accumulator is not None:
                accumulator.close()


class _Accumulator:
    """Sums products into ``out``; in fp32 where several would be rounded to a half type in between."""

    def __init__(self, out: Tensor) -> None:
        self.out, self.products = out, 0
        self.wide: Tensor | None = None

    def add_product(self, a: Tensor, b: Tensor) -> None:
        self.products += 1
        if self.products == 1:
            matmul_into(self.out, a, b)
        elif self.out.dtype.itemsize >= 4:
            self.out += matmul(a, b)
        else:
            if self.wide is None:
                self.wide = self.out.float()
            self.wide += matmul(a, b)

    def close(self) -> None:
        if self.wide is not None:
            self.out.copy_(self.wide)


def _biases(up_bias_EF: Tensor | None, x_mD: Tensor) -> tuple[Tensor, ...] | None:
    return None if up_bias_EF is None else up_bias_EF.to(x_mD.dtype).unbind()


def _most_rows(up_EFD: Tensor) -> int:
    return max(256, BLOCK_BYTES // (up_EFD.shape[1] * up_EFD.element_size()))


def _gradients_of(weight: Tensor, counts: list[int], buffers: Buffers) -> Tensor:
    """A buffer for the gradient of stacked weights, zero where an expert had no rows."""
    out = buffers.empty(tuple(weight.shape), weight.dtype, weight.device)
    for e, count in enumerate(counts):
        if count == 0:
            out[e].zero_()
    return out


def _rows_with_zero(rows: int, like: Tensor, buffers: Buffers) -> Tensor:
    """[rows + 1, D], the last row zeros: what a missing assignment adds."""
    out = buffers.empty((rows + 1, like.shape[1]), like.dtype, like.device)
    out[rows].zero_()
    return out
