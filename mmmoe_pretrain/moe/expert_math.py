"""The computation of a stack of experts by grouped products, for GPUs; ``cpu/blocked.py`` is for CPUs.

Shapes: x_mD rows, weights_A routing weights in the plan's order, up_EFD [E, width F, D], down_EDF [E, D, F].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.moe.activation import weighted
from mmmoe_pretrain.moe.cpu.buffers import Buffers
from mmmoe_pretrain.moe.plan import ExpertPlan, sum_rows, take_rows, to_device

ALIGNMENT = 16  # bytes; grouped_mm wants the inner sizes to be multiples


@dataclass(frozen=True)
class ExpertStack:
    """Equal experts. ``up_bias_EF``: of the first products. ``recompute``: the backward pass computes the
    activations again. ``buffers``: memory that a CPU uses again in every step. ``cpu_config``: how it multiplies."""

    up_EFD: Tensor
    down_EDF: Tensor
    activation: str
    up_bias_EF: Tensor | None = None
    recompute: bool = False
    buffers: Buffers = field(default_factory=Buffers)
    cpu_config: CpuConfig = field(default_factory=CpuConfig)


# x_mD, weights_A, plan, stack -> [m, D]: the weighted sum of each row's experts
ExpertMath = Callable[[Tensor, Tensor, ExpertPlan, ExpertStack], Tensor]


def grouped_mm(x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan, stack: ExpertStack) -> Tensor:
    """See ``ExpertMath``. Two products over all experts at once (torch.nn.functional.grouped_mm)."""
    ends = to_device(list(itertools.accumulate(plan.counts)), torch.int32, x_mD.device)

    def products(x_mD: Tensor, weights_A: Tensor, up_EFD: Tensor, down_EDF: Tensor, bias: Tensor | None) -> Tensor:
        up_AF = F.grouped_mm(take_rows(x_mD, plan), up_EFD.transpose(1, 2), offs=ends)
        if bias is not None:
            up_AF = up_AF + bias.to(up_AF.dtype).index_select(0, plan.experts_A)
        return F.grouped_mm(weighted(stack.activation, up_AF, weights_A), down_EDF.transpose(1, 2), offs=ends)

    tensors = (x_mD, weights_A, stack.up_EFD, stack.down_EDF, stack.up_bias_EF)
    if stack.recompute:  # it stops before the second product, of which only the inputs are needed
        y_AD = checkpoint(products, *tensors, use_reentrant=False, preserve_rng_state=False)
    else:
        y_AD = products(*tensors)
    return sum_rows(y_AD, plan)


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
