"""The non-linearity inside an expert.

An expert is two products around it: x [n, D] -> up [n, width F] -> h [n, F] -> y [n, D]. SwiGLU (arXiv 2002.05202)
takes gate and up concatenated, width 2F; GELU takes F. Clamped SwiGLU is that of GPT-OSS (arXiv 2508.10925): (up + 1)
gate sigmoid(1.702 gate) with gate at most 7 and up within -7 and 7.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain import kernels

LIMIT, ALPHA = 7.0, 1.702  # of clamped SwiGLU


@dataclass(frozen=True)
class Activation:
    """``width``: columns of the first product, in F. ``forward``: [n, width F] -> h [n, F]."""

    width: int
    forward: Callable[[Tensor], Tensor]


def swiglu(up_nF: Tensor) -> Tensor:
    """silu(gate) * up, gate and up side by side."""
    if kernels.usable(up_nF):
        from mmmoe_pretrain.kernels import swiglu as fused

        return fused.swiglu(up_nF)
    gate, up = up_nF.chunk(2, dim=-1)
    return F.silu(gate) * up


def weighted(activation: str, up_AF: Tensor, weights_A: Tensor) -> Tensor:
    """The activation of each row, times the row's weight; differentiable."""
    if activation == "swiglu" and kernels.usable(up_AF):
        from mmmoe_pretrain.kernels import swiglu as fused

        return fused.swiglu(up_AF, weights_A)
    return ACTIVATIONS[activation].forward(up_AF) * weights_A[:, None].to(up_AF.dtype)


def clamped_swiglu(up_nF: Tensor) -> Tensor:
    """(up + 1) * gate * sigmoid(ALPHA gate) of the clamped gate and up, side by side."""
    gate, up = up_nF.chunk(2, dim=-1)
    gate = gate.clamp(max=LIMIT)
    return (up.clamp(-LIMIT, LIMIT) + 1) * (gate * torch.sigmoid(ALPHA * gate))


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(2, swiglu),
    "clamped_swiglu": Activation(2, clamped_swiglu),
    "gelu": Activation(1, F.gelu),
}
