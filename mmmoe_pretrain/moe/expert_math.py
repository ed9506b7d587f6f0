"""The computation of a stack of experts by grouped products, for GPUs; ``cpu/blocked.py`` is for CPUs.

For the backward pass are kept the rows [m, D] and, of each assignment, the first product and the routing weight; the
gathered rows and the input of the second product are made again without a product, as in SonicMoE (arXiv 2512.14080).
With ``recompute`` the first product is not kept either, but computed again. docs/expert_layer.md has the bytes.

Shapes: x_mD rows, weights_A routing weights in the plan's order, up_EFD [E, width F, D], down_EDF [E, D, F], ends_E
where each expert's assignments end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmmoe_pretrain import kernels
from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.moe.activation import weighted
from mmmoe_pretrain.moe.cpu import activation as by_hand
from mmmoe_pretrain.moe.cpu.buffers import Buffers
from mmmoe_pretrain.moe.plan import ExpertPlan, zero_unused_

ALIGNMENT = 16  # bytes; grouped_mm wants the inner sizes to be multiples


@dataclass(frozen=True)
class ExpertStack:
    """Equal experts. ``up_bias_EF``: of the first products. ``recompute``: the backward pass computes the
    first product again. ``output_is_needed``: else only what the backward pass needs may be computed, and any
    output returned. ``buffers``: memory that a CPU uses in every step. ``cpu_config``: how it multiplies."""

    up_EFD: Tensor
    down_EDF: Tensor
    activation: str
    up_bias_EF: Tensor | None = None
    recompute: bool = False
    output_is_needed: bool = True
    buffers: Buffers = field(default_factory=Buffers)
    cpu_config: CpuConfig = field(default_factory=CpuConfig)


# x_mD, weights_A, plan, stack -> [m, D]: the weighted sum of each row's experts
ExpertMath = Callable[[Tensor, Tensor, ExpertPlan, ExpertStack], Tensor]


def grouped_mm(x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan, stack: ExpertStack) -> Tensor:
    """See ``ExpertMath``. Two products over all experts at once (torch.nn.functional.grouped_mm)."""
    keep = torch.is_grad_enabled() and not stack.recompute  # gradients are never enabled inside the function
    return _Grouped.apply(x_mD, weights_A, stack.up_EFD, stack.down_EDF, stack.up_bias_EF, plan, stack, keep)


class _Grouped(torch.autograd.Function):
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
        ends_E = plan.ends_E
        up_AF = _first_product(x_mD, up_EFD, up_bias_EF, plan, ends_E)
        ctx.plan, ctx.activation = plan, stack.activation
        ctx.save_for_backward(x_mD, weights_A, up_EFD, down_EDF, up_bias_EF, ends_E, up_AF if keep else None)
        if not stack.output_is_needed:
            return torch.zeros_like(x_mD)
        h_AF = weighted(stack.activation, up_AF, weights_A)
        return plan.sum_by_row(zero_unused_(F.grouped_mm(h_AF, down_EDF.transpose(1, 2), offs=ends_E), plan))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mD: Tensor) -> tuple[Tensor | None, ...]:
        x_mD, weights_A, up_EFD, down_EDF, up_bias_EF, ends_E, up_AF = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # the first product is needed no longer than its gradient takes
        plan: ExpertPlan = ctx.plan
        needs_x, needs_weights, needs_up, needs_down, needs_bias = ctx.needs_input_grad[:5]
        grad_x = grad_weights = grad_up = grad_down = grad_bias = grad_up_AF = None
        if up_AF is None:
            up_AF = _first_product(x_mD, up_EFD, up_bias_EF, plan, ends_E)
        grad_y_AD = grad_mD.index_select(0, plan.rows_A)
        if needs_x or needs_weights or needs_up or needs_bias:
            grad_h_AF = F.grouped_mm(grad_y_AD, down_EDF, offs=ends_E)
            h_AF, grad_up_AF, grad_weights = _weighted_backward(
                ctx.activation, grad_h_AF, up_AF, weights_A, needs_down
            )
            del grad_h_AF
        else:
            h_AF = weighted(ctx.activation, up_AF, weights_A)
        del up_AF
        if needs_down:
            assert h_AF is not None
            grad_down = F.grouped_mm(grad_y_AD.t(), h_AF, offs=ends_E)
        del h_AF, grad_y_AD
        if grad_up_AF is not None and needs_up:
            grad_up = F.grouped_mm(grad_up_AF.t(), x_mD.index_select(0, plan.rows_A), offs=ends_E)
        if grad_up_AF is not None and needs_bias:
            grad_bias = torch.zeros_like(up_bias_EF).index_add_(
                0, plan.experts_A, zero_unused_(grad_up_AF, plan).to(up_bias_EF.dtype)
            )
        if grad_up_AF is not None and needs_x:
            grad_x = plan.sum_by_row(zero_unused_(F.grouped_mm(grad_up_AF, up_EFD, offs=ends_E), plan))
        if grad_weights is not None:
            grad_weights = zero_unused_(grad_weights, plan)
        return grad_x, grad_weights if needs_weights else None, grad_up, grad_down, grad_bias, None, None, None


def _first_product(
    x_mD: Tensor, up_EFD: Tensor, up_bias_EF: Tensor | None, plan: ExpertPlan, ends_E: Tensor
) -> Tensor:
    up_AF = F.grouped_mm(x_mD.index_select(0, plan.rows_A), up_EFD.transpose(1, 2), offs=ends_E)
    return up_AF if up_bias_EF is None else up_AF.add_(up_bias_EF.to(up_AF.dtype).index_select(0, plan.experts_A))


def _weighted_backward(
    activation: str, grad_AF: Tensor, up_AF: Tensor, weights_A: Tensor, with_output: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """``weighted`` again (if ``with_output``; it may overwrite ``grad_AF``), and the gradients of ``up_AF`` and the
    weights."""
    if activation == "swiglu" and kernels.usable(up_AF):
        from mmmoe_pretrain.kernels import swiglu as fused

        h_AF = grad_AF if with_output else None  # written over it: memory peaks here
        grad_up_AF, grad_weights_A = fused.backward(grad_AF, up_AF, weights_A, h_AF)
        assert grad_weights_A is not None
        return h_AF, grad_up_AF, grad_weights_A
    scale_A1 = weights_A[:, None].to(up_AF.dtype)
    h_AF, grad_up_AF = torch.empty_like(grad_AF), torch.empty_like(up_AF)
    by_hand.GRADIENTS[activation](up_AF, grad_AF * scale_A1, h_AF, grad_up_AF)  # all rows at once
    grad_weights_A = (grad_AF * h_AF).sum(-1, dtype=weights_A.dtype)
    return h_AF.mul_(scale_A1), grad_up_AF, grad_weights_A


def grouped_mm_fits(x_mD: Tensor, plan: ExpertPlan, stack: ExpertStack) -> bool:
    """Whether ``grouped_mm`` covers these types, sizes and this device. On a GPU it is documented only for bf16
    and compute capability 8.0 or higher."""
    row_bytes = [size * x_mD.element_size() for w in (stack.up_EFD, stack.down_EDF) for size in w.shape[1:]]
    return (
        hasattr(F, "grouped_mm")
        and plan.num_assignments > 0
        and (x_mD.dtype is torch.bfloat16 or (x_mD.dtype is torch.float32 and x_mD.device.type == "cpu"))
        and (x_mD.device.type != "cuda" or torch.cuda.get_device_capability(x_mD.device) >= (8, 0))
        and all(size % ALIGNMENT == 0 for size in row_bytes)
    )
