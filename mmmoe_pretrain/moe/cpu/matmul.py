"""Matrix products by the faster of torch's CPU libraries.

torch sends fp32 products to MKL and bf16 ones to oneDNN. For fp32 oneDNN is the faster of the two
where MKL does not use the widest vectors (measured on an AMD CPU with AVX-512, 64 x 512 x 2,048: 933
us against 1,603; on Intel not measured). torch has no public switch for it, only the operator that
its compiler emits; without that operator, on other devices and types, and under a dispatch mode (a
counter of operations knows ``mm`` alone), the product is ``torch.mm``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """[n, k] x [k, m] -> [n, m]; any strides. No gradient: for backward passes by hand."""
    if _by_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """The same, written to ``out``."""
    if _by_onednn(a, b):
        out.copy_(matmul(a, b))
    else:
        torch.mm(a, b, out=out)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_nD, weight_ED)
        return matmul(x_nD, weight_ED.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_nD, weight_ED = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        return (
            matmul(grad_nE, weight_ED) if needs_x else None,
            matmul(grad_nE.t(), x_nD) if needs_weight else None,
        )


def linear(x_nD: Tensor, weight_ED: Tensor) -> Tensor:
    """``torch.nn.functional.linear`` without a bias, [n, D] -> [n, E]; differentiable once."""
    return _Linear.apply(x_nD, weight_ED)


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        ONEDNN
        and a.dtype is torch.float32
        and a.device.type == "cpu"
        and a.numel() > 0
        and b.numel() > 0
        and not is_in_torch_dispatch_mode()
    )
