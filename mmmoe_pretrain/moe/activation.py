"""The non-linearity inside an expert, with its backward pass by hand.

An expert is two products around it: x [n, D] -> up [n, width F] -> h [n, F] -> y [n, D]. SwiGLU
(arXiv 2002.05202) takes gate and up side by side, width 2F; GELU takes F.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """``width``: columns of the first product, in F. ``forward``: [n, width F] -> h [n, F].
    ``again``: the same in the backward pass, with what it kept. ``backward``: gradient of h (which it
    may overwrite), the input, and what was kept -> the input's gradient."""

    width: int
    forward: Callable[[Tensor], Tensor]
    again: Callable[[Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor], Tensor]


def swiglu(up_nF: Tensor) -> Tensor:
    """silu(gate) * up, gate and up side by side."""
    gate, up = up_nF.chunk(2, dim=-1)
    return F.silu(gate) * up


def _swiglu_again(up_nF: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = up_nF.chunk(2, dim=-1)
    activated = F.silu(gate)
    return activated * up, activated


def _swiglu_backward(grad_h: Tensor, up_nF: Tensor, activated: Tensor) -> Tensor:
    gate, up = up_nF.chunk(2, dim=-1)
    grad = torch.empty_like(up_nF)
    grad_gate, grad_up = grad.chunk(2, dim=-1)
    torch.mul(grad_h, activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(grad_h.mul_(up), gate, grad_input=grad_gate)
    return grad


def _gelu_again(up_nF: Tensor) -> tuple[Tensor, Tensor]:
    return F.gelu(up_nF), up_nF


def _gelu_backward(grad_h: Tensor, up_nF: Tensor, kept: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad_h, up_nF)


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(2, swiglu, _swiglu_again, _swiglu_backward),
    "gelu": Activation(1, F.gelu, _gelu_again, _gelu_backward),
}
