"""Matrix products by one of torch's CPU libraries.

torch sends fp32 products to MKL and bf16 ones to oneDNN, so there is a choice in fp32 alone. Which is faster depends
on the CPU and on the sizes (measured on an AMD CPU with AVX-512: oneDNN 334 us against 668 for 64 x 512 x 1,024, but
19 against 12 for 64 x 64 x 128; on an Intel Xeon MKL is faster), so a run measures it (``calibration.py``).

``products`` is a value of ``train.cpu.products``. torch has no public switch for oneDNN, only the operator that its
compiler emits; without that operator, on other devices and types, and under a dispatch mode (a counter of operations
knows ``mm`` alone), the product is ``torch.mm`` whatever it says. ``auto`` that nobody resolved is oneDNN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def matmul(a: Tensor, b: Tensor, products: str = "auto") -> Tensor:
    """[n, k] x [k, m] -> [n, m]; any strides. No gradient: for backward passes by hand."""
    if _by_onednn(a, b, products):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


def matmul_into(out: Tensor, a: Tensor, b: Tensor, products: str = "auto") -> None:
    """The same, written to ``out``."""
    if _by_onednn(a, b, products):
        out.copy_(matmul(a, b, products))
    else:
        torch.mm(a, b, out=out)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, weight_ED: Tensor, products: str) -> Tensor:
        ctx.save_for_backward(x_nD, weight_ED)
        ctx.products = products
        return matmul(x_nD, weight_ED.t(), products)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_nE: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_nD, weight_ED = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return (
            matmul(grad_nE, weight_ED, ctx.products) if needs_x else None,
            matmul(grad_nE.t(), x_nD, ctx.products) if needs_weight else None,
            None,
        )


def linear(x_nD: Tensor, weight_ED: Tensor, products: str = "auto") -> Tensor:
    """``torch.nn.functional.linear`` without a bias, [n, D] -> [n, E]; differentiable once."""
    return _Linear.apply(x_nD, weight_ED, products)


def _by_onednn(a: Tensor, b: Tensor, products: str) -> bool:
    return (
        HAS_ONEDNN
        and products != "torch"
        and a.dtype is torch.float32
        and a.device.type == "cpu"
        and a.numel() > 0
        and b.numel() > 0
        and not is_in_torch_dispatch_mode()
    )
