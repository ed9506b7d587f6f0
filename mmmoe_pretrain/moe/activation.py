"""The non-linearity inside an expert, with its backward pass by hand.

An expert is two products around it: x [n, D] -> up [n, width F] -> h [n, F] -> y [n, D]. SwiGLU
(arXiv 2002.05202) takes gate and up side by side, width 2F; GELU takes F. Clamped SwiGLU is that of GPT-OSS
(arXiv 2508.10925): (up + 1) gate sigmoid(1.702 gate) with gate at most 7 and up within -7 and 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain import kernels

LIMIT, ALPHA = 7.0, 1.702  # of clamped SwiGLU
CHUNK_BYTES = 1 << 20  # of the widest tensor of a chain of elementwise operations: it stays in the cache


@dataclass(frozen=True)
class Activation:
    """``width``: columns of the first product, in F. ``forward``: [n, width F] -> h [n, F], differentiable;
    ``in_chunks``: the same, faster and without a gradient.
    ``backward``: the gradient of h (which it may overwrite) and the input -> h again, and the input's
    gradient."""

    width: int
    forward: Callable[[Tensor], Tensor]
    in_chunks: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def swiglu(up_nF: Tensor) -> Tensor:
    """silu(gate) * up, gate and up side by side."""
    if kernels.usable(up_nF):
        from mmmoe_pretrain.kernels import swiglu as fused

        return fused.swiglu(up_nF)
    gate, up = up_nF.chunk(2, dim=-1)
    return F.silu(gate) * up


def weighted(activation: str, up_AF: Tensor, weights_A: Tensor) -> Tensor:
    """What the activation makes of each row, times the row's weight; differentiable."""
    if activation == "swiglu" and kernels.usable(up_AF):
        from mmmoe_pretrain.kernels import swiglu as fused

        return fused.swiglu(up_AF, weights_A)
    return ACTIVATIONS[activation].forward(up_AF) * weights_A[:, None].to(up_AF.dtype)


def _swiglu_in_chunks(up_nF: Tensor) -> Tensor:
    h = up_nF.new_empty(up_nF.shape[0], up_nF.shape[1] // 2)
    for up, out in _chunks(up_nF, h):
        gate, value = up.chunk(2, dim=-1)
        torch.mul(F.silu(gate), value, out=out)
    return h


def _swiglu_backward(grad_h_nF: Tensor, up_nF: Tensor) -> tuple[Tensor, Tensor]:
    h, grad_nF = torch.empty_like(grad_h_nF), torch.empty_like(up_nF)
    for up, grad_h, out, grad in _chunks(up_nF, grad_h_nF, h, grad_nF):
        gate, value = up.chunk(2, dim=-1)
        grad_gate, grad_value = grad.chunk(2, dim=-1)
        activated = F.silu(gate)
        torch.mul(activated, value, out=out)
        torch.mul(grad_h, activated, out=grad_value)
        torch.ops.aten.silu_backward.grad_input(grad_h.mul_(value), gate, grad_input=grad_gate)
    return h, grad_nF


def clamped_swiglu(up_nF: Tensor) -> Tensor:
    """(up + 1) * gate * sigmoid(ALPHA gate) of the clamped gate and up, side by side."""
    gate, up = up_nF.chunk(2, dim=-1)
    gate = gate.clamp(max=LIMIT)
    return (up.clamp(-LIMIT, LIMIT) + 1) * (gate * torch.sigmoid(ALPHA * gate))


def _clamped_in_chunks(up_nF: Tensor) -> Tensor:
    h = up_nF.new_empty(up_nF.shape[0], up_nF.shape[1] // 2)
    for up, out in _chunks(up_nF, h):
        out.copy_(clamped_swiglu(up))
    return h


def _clamped_backward(grad_h_nF: Tensor, up_nF: Tensor) -> tuple[Tensor, Tensor]:
    """With s = sigmoid(ALPHA gate): d h / d gate = (up + 1) s (1 + ALPHA gate (1 - s)); 0 where clamped."""
    h, grad_nF = torch.empty_like(grad_h_nF), torch.empty_like(up_nF)
    for up, grad_h, out, grad in _chunks(up_nF, grad_h_nF, h, grad_nF):
        gate, value = up.chunk(2, dim=-1)
        grad_gate, grad_value = grad.chunk(2, dim=-1)
        low, plus_one = gate.clamp(max=LIMIT), value.clamp(-LIMIT, LIMIT) + 1
        s = torch.sigmoid(ALPHA * low)
        activated = low * s
        torch.mul(plus_one, activated, out=out)
        grad_value.copy_(grad_h * activated).masked_fill_(value.abs() > LIMIT, 0)
        slope = s * (1 + ALPHA * low * (1 - s))
        grad_gate.copy_(grad_h * plus_one * slope).masked_fill_(gate > LIMIT, 0)
    return h, grad_nF


def _gelu_backward(grad_h_nF: Tensor, up_nF: Tensor) -> tuple[Tensor, Tensor]:
    return F.gelu(up_nF), torch.ops.aten.gelu_backward(grad_h_nF, up_nF)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each; a GPU takes all rows at once. The first tensor is the widest."""
    widest = tensors[0]
    if widest.device.type != "cpu":
        return iter([tensors])
    rows = max(1, CHUNK_BYTES // max(1, widest.shape[1] * widest.element_size()))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(2, swiglu, _swiglu_in_chunks, _swiglu_backward),
    "clamped_swiglu": Activation(2, clamped_swiglu, _clamped_in_chunks, _clamped_backward),
    "gelu": Activation(1, F.gelu, F.gelu, _gelu_backward),
}
