"""The arithmetic of a stack of experts, by two back ends with one signature.

``blocked`` takes one expert after another: a piece of its rows is gathered, multiplied, activated and
multiplied while it is in the cache. It covers every type and shape. ``grouped_mm`` gathers all rows
and makes two grouped products (torch.nn.functional.grouped_mm): the way of a GPU.

Shapes: x_mD rows, weights_A routing weights in the plan's order, P assignments with padding
(``layout.py``), up_EFD [E, width F, D], down_EDF
[E, D, F]: each expert as torch.nn.Linear keeps its weight, which is the faster way with few rows (measured,
16 rows in bf16: 163 GFLOP/s against 103 for the first product, 223 against 128 for its weight gradient).
Routing weights cost ``blocked`` no pass of their own: forward they are part of the sum over a row's
experts, backward they multiply the gathered gradient, which is the narrowest tensor there is.

With ``recompute`` no tensor of the width of the first product is kept: the backward pass multiplies it
again, piece by piece, with the same arithmetic and so the same result (in SwiGLU 2/9 more of it).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from mmmoe_pretrain.moe.activation import ACTIVATIONS, Activation, weighted
from mmmoe_pretrain.moe.cores import side_by_side
from mmmoe_pretrain.moe.host import to_device
from mmmoe_pretrain.moe.layout import Piece, lay_out
from mmmoe_pretrain.moe.memory import Buffers
from mmmoe_pretrain.moe.plan import ExpertPlan, sum_rows, take_rows
from mmmoe_pretrain.moe.products import product, product_into

BLOCK_BYTES = 16 << 20  # of a piece's widest tensor: malloc recycles that size, and weight gradients are few sums
GROUPED_ALIGNMENT = 16  # bytes; grouped_mm wants the inner sizes to be multiples


class ExpertMath(Protocol):
    def __call__(
        self,
        x_mD: Tensor,
        weights_A: Tensor,
        plan: ExpertPlan,
        up_EFD: Tensor,
        down_EDF: Tensor,
        activation: str,
        buffers: Buffers,
        recompute: bool = False,
        up_bias_EF: Tensor | None = None,
    ) -> Tensor:
        """[m, D] -> [m, D]: the weighted sum of each row's experts. ``up_bias_EF``: of the first products."""
        ...


def blocked(
    x_mD: Tensor,
    weights_A: Tensor,
    plan: ExpertPlan,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
    buffers: Buffers,
    recompute: bool = False,
    up_bias_EF: Tensor | None = None,
) -> Tensor:
    """See ``ExpertMath``."""
    keep = torch.is_grad_enabled() and not recompute  # inside the function gradients never are enabled
    return _Blocked.apply(x_mD, weights_A, up_EFD, down_EDF, up_bias_EF, plan, activation, buffers, keep)


def grouped_mm(
    x_mD: Tensor,
    weights_A: Tensor,
    plan: ExpertPlan,
    up_EFD: Tensor,
    down_EDF: Tensor,
    activation: str,
    buffers: Buffers,
    recompute: bool = False,
    up_bias_EF: Tensor | None = None,
) -> Tensor:
    """The same by grouped products over all experts at once."""
    ends = to_device(list(itertools.accumulate(plan.counts)), torch.int32, x_mD.device)

    def products(x_mD: Tensor, weights_A: Tensor, up_EFD: Tensor, down_EDF: Tensor, bias: Tensor | None) -> Tensor:
        up_AF = F.grouped_mm(take_rows(x_mD, plan), up_EFD.transpose(1, 2), offs=ends)
        if bias is not None:
            up_AF = up_AF + bias.to(up_AF.dtype).index_select(0, plan.experts_with_none()[:-1])
        return F.grouped_mm(weighted(activation, up_AF, weights_A), down_EDF.transpose(1, 2), offs=ends)

    tensors = (x_mD, weights_A, up_EFD, down_EDF, up_bias_EF)
    if recompute:  # it stops before the second product, whose inputs are all that is wanted
        y_AD = checkpoint(products, *tensors, use_reentrant=False, preserve_rng_state=False)
    else:
        y_AD = products(*tensors)
    return sum_rows(y_AD, plan)


EXPERT_BACKENDS: dict[str, ExpertMath] = {"blocked": blocked, "grouped_mm": grouped_mm}


def choose_backend(name: str, x_mD: Tensor, plan: ExpertPlan, up_EFD: Tensor, down_EDF: Tensor) -> ExpertMath:
    """``auto``: grouped products on a GPU, blocks on a CPU; blocks wherever grouped_mm has a hole. On a
    GPU grouped products are documented for bf16 and compute capability 8.0 up alone."""
    wants_grouped = name == "grouped_mm" or (name == "auto" and x_mD.device.type != "cpu")
    if wants_grouped and _grouped_mm_fits(x_mD, plan, up_EFD, down_EDF):
        return grouped_mm
    return blocked


def _grouped_mm_fits(x_mD: Tensor, plan: ExpertPlan, up_EFD: Tensor, down_EDF: Tensor) -> bool:
    row_bytes = [size * x_mD.element_size() for w in (up_EFD, down_EDF) for size in w.shape[1:]]
    return (
        hasattr(F, "grouped_mm")
        and plan.num_assignments > 0
        and (x_mD.dtype is torch.bfloat16 or (x_mD.dtype is torch.float32 and x_mD.device.type == "cpu"))
        and (x_mD.device.type != "cuda" or torch.cuda.get_device_capability(x_mD.device) >= (8, 0))
        and all(size % GROUPED_ALIGNMENT == 0 for size in row_bytes)
    )


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
        activation: str,
        buffers: Buffers,
        keep: bool,
    ) -> Tensor:
        act = ACTIVATIONS[activation]
        pad = x_mD.device.type == "cpu" and x_mD.dtype is not torch.float64
        layout = lay_out(plan, weights_A.detach(), _most_rows(up_EFD), pad)
        rows = layout.plan.rows_A.split(layout.lengths)
        y_PD = _rows_with_zero(layout.plan.num_assignments, x_mD, buffers)
        ups, downs = up_EFD.unbind(), down_EDF.unbind()
        biases = _biases(up_bias_EF, x_mD)
        kept = [x_mD] * len(layout.pieces)

        def compute(index: int) -> None:
            piece = layout.pieces[index]
            up = product(x_mD.index_select(0, rows[index]), ups[piece.expert].t())
            if biases is not None:
                up += biases[piece.expert]
            product_into(y_PD[piece.start : piece.end], act.in_chunks(up), downs[piece.expert].t())
            if keep:
                kept[index] = up

        side_by_side(compute, layout.lengths, x_mD.device)
        ctx.layout, ctx.activation, ctx.buffers = layout, act, buffers
        ctx.save_for_backward(x_mD, up_EFD, down_EDF, up_bias_EF, y_PD, *(kept if keep else ()))
        return layout.plan.sum_by_row(y_PD, layout.weights_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mD: Tensor) -> tuple[Tensor | None, ...]:
        x_mD, up_EFD, down_EDF, up_bias_EF, y_PD, *kept = ctx.saved_tensors
        layout = ctx.layout
        first_products = kept or [None] * len(layout.pieces)
        counts = [0] * up_EFD.shape[0]
        for piece in layout.pieces:
            counts[piece.expert] += piece.end - piece.start
        needs_up, needs_down, needs_bias = ctx.needs_input_grad[2:5]
        task = _Backward(
            x_mD=x_mD,
            y_PD=y_PD,
            scale_P1=layout.weights_P.to(x_mD.dtype)[:, None],
            ups=up_EFD.unbind(),
            downs=down_EDF.unbind(),
            biases=_biases(up_bias_EF, x_mD),
            activation=ctx.activation,
            grad_mD=grad_mD,
            grad_x_PD=_rows_with_zero(layout.plan.num_assignments, x_mD, ctx.buffers),
            grad_weights_P=torch.empty_like(layout.weights_P),
            grad_up=_gradients_of(up_EFD, counts, ctx.buffers) if needs_up else None,
            grad_down=_gradients_of(down_EDF, counts, ctx.buffers) if needs_down else None,
            grad_bias=torch.zeros_like(up_bias_EF) if needs_bias else None,
        )
        work: dict[int, list[tuple[Piece, Tensor, Tensor | None]]] = {}
        rows_of = layout.plan.rows_A.split(layout.lengths)
        for piece, rows, up in zip(layout.pieces, rows_of, first_products, strict=True):
            work.setdefault(piece.expert, []).append((piece, rows, up))
        busy = list(work)
        side_by_side(lambda i: task.expert(busy[i], work[busy[i]]), [counts[e] for e in busy], x_mD.device)
        grad_x_mD = layout.plan.sum_by_row(task.grad_x_PD)
        grad_weights_A = task.grad_weights_P.index_select(0, layout.position_A)
        return grad_x_mD, grad_weights_A, task.grad_up, task.grad_down, task.grad_bias, None, None, None, None


@dataclass(frozen=True)
class _Backward:
    """The backward pass of all experts; ``expert`` writes one expert's part of the gradients."""

    x_mD: Tensor
    y_PD: Tensor
    scale_P1: Tensor
    ups: tuple[Tensor, ...]
    downs: tuple[Tensor, ...]
    biases: tuple[Tensor, ...] | None
    activation: Activation
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
                up = product(x, self.ups[e].t())
                if self.biases is not None:
                    up += self.biases[e]
            h, grad = self.activation.backward(product(grad_y, self.downs[e]), up)
            if into_down is not None:
                into_down.add_product(grad_y.t(), h)
            if into_up is not None:
                into_up.add_product(grad.t(), self.x_mD.index_select(0, rows) if x is None else x)
            if self.grad_bias is not None:
                self.grad_bias[e] += grad.sum(0, dtype=self.grad_bias.dtype)
            product_into(self.grad_x_PD[here], grad, self.ups[e])
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
            product_into(self.out, a, b)
        elif self.out.dtype.itemsize >= 4:
            self.out += product(a, b)
        else:
            if self.wide is None:
                self.wide = self.out.float()
            self.wide += product(a, b)

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
