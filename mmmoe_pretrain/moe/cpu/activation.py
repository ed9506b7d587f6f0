"""The activations of ``moe/activation.py`` for the blocked experts: forward without autograd, and backward by hand.

On a CPU they go over a few rows at a time, which stay in the cache from one elementwise operation to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.moe import activation

CHUNK_BYTES = 1 << 20  # of the widest tensor of a chain of elementwise operations


@dataclass(frozen=True)
class ActivationKernels:
    """``forward``: [n, width F] -> h [n, F]. ``backward``: the gradient of h (which it may overwrite) and the input
    -> h again, and the input's gradient."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _swiglu_forward(up_nF: Tensor) -> Tensor:
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


def _clamped_forward(up_nF: Tensor) -> Tensor:
    h = up_nF.new_empty(up_nF.shape[0], up_nF.shape[1] // 2)
    for up, out in _chunks(up_nF, h):
        out.copy_(activation.clamped_swiglu(up))
    return h


def _clamped_backward(grad_h_nF: Tensor, up_nF: Tensor) -> tuple[Tensor, Tensor]:
    """With s = sigmoid(ALPHA gate): d h / d gate = (up + 1) s (1 + ALPHA gate (1 - s)); 0 where clamped."""
    h, grad_nF = torch.empty_like(grad_h_nF), torch.empty_like(up_nF)
    for up, grad_h, out, grad in _chunks(up_nF, grad_h_nF, h, grad_nF):
        gate, value = up.chunk(2, dim=-1)
        grad_gate, grad_value = grad.chunk(2, dim=-1)
        low, plus_one = gate.clamp(max=activation.LIMIT), value.clamp(-activation.LIMIT, activation.LIMIT) + 1
        s = torch.sigmoid(activation.ALPHA * low)
        activated = low * s
        torch.mul(plus_one, activated, out=out)
        grad_value.copy_(grad_h * activated).masked_fill_(value.abs() > activation.LIMIT, 0)
        slope = s * (1 + activation.ALPHA * low * (1 - s))
        grad_gate.copy_(grad_h * plus_one * slope).masked_fill_(gate > activation.LIMIT, 0)
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


KERNELS: dict[str, ActivationKernels] = {  # a line for each of ACTIVATIONS
    "swiglu": ActivationKernels(_swiglu_forward, _swiglu_backward),
    "clamped_swiglu": ActivationKernels(_clamped_forward, _clamped_backward),
    "gelu": ActivationKernels(F.gelu, _gelu_backward),
}
