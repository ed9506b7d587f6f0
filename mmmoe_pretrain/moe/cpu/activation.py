"""The activations of ``moe/activation.py`` and their gradients for the blocked experts.

On a CPU they go over a few rows at a time, which stay in the cache from one elementwise operation to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.moe.activation import ACTIVATIONS, ALPHA, LIMIT

CHUNK_BYTES = 1 << 20  # of the widest tensor of a chain of elementwise operations: it stays in the cache between them


def forward(activation: str, up_nF: Tensor) -> Tensor:
    """[n, width F] -> h [n, F]."""
    kind = ACTIVATIONS[activation]
    h_nF = up_nF.new_empty(up_nF.shape[0], up_nF.shape[1] // kind.width)
    for up, h in _chunks(up_nF, h_nF):
        h.copy_(kind.forward(up))
    return h_nF


def backward(activation: str, grad_h_nF: Tensor, up_nF: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of h (it may be overwritten) and the input -> h again, and the input's gradient."""
    h_nF, grad_nF = torch.empty_like(grad_h_nF), torch.empty_like(up_nF)
    for up, grad_h, h, grad in _chunks(up_nF, grad_h_nF, h_nF, grad_nF):
        GRADIENTS[activation](up, grad_h, h, grad)
    return h_nF, grad_nF


def _swiglu(up: Tensor, grad_h: Tensor, h: Tensor, grad: Tensor) -> None:
    (gate, value), (grad_gate, grad_value) = up.chunk(2, dim=-1), grad.chunk(2, dim=-1)
    activated = F.silu(gate)
    torch.mul(activated, value, out=h)
    torch.mul(grad_h, activated, out=grad_value)
    torch.ops.aten.silu_backward.grad_input(grad_h.mul_(value), gate, grad_input=grad_gate)


def _clamped_swiglu(up: Tensor, grad_h: Tensor, h: Tensor, grad: Tensor) -> None:
    """With s = sigmoid(ALPHA gate): d h / d gate = (up + 1) s (1 + ALPHA gate (1 - s)); 0 where clamped."""
    (gate, value), (grad_gate, grad_value) = up.chunk(2, dim=-1), grad.chunk(2, dim=-1)
    low, plus_one = gate.clamp(max=LIMIT), value.clamp(-LIMIT, LIMIT) + 1
    s = torch.sigmoid(ALPHA * low)
    activated = low * s
    torch.mul(plus_one, activated, out=h)
    grad_value.copy_(grad_h * activated).masked_fill_(value.abs() > LIMIT, 0)
    slope = s * (1 + ALPHA * low * (1 - s))
    grad_gate.copy_(grad_h * plus_one * slope).masked_fill_(gate > LIMIT, 0)


def _gelu(up: Tensor, grad_h: Tensor, h: Tensor, grad: Tensor) -> None:
    h.copy_(F.gelu(up))
    torch.ops.aten.gelu_backward.grad_input(grad_h, up, grad_input=grad)


# A line for each of ACTIVATIONS. The input and the gradient of h are given; h and the input's gradient are written.
GRADIENTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], None]] = {
    "swiglu": _swiglu,
    "clamped_swiglu": _clamped_swiglu,
    "gelu": _gelu,
}


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each; a GPU takes all rows at once. The first tensor is the widest."""
    widest = tensors[0]
    if widest.device.type != "cpu":
        return iter([tensors])
    rows = max(1, CHUNK_BYTES // max(1, widest.shape[1] * widest.element_size()))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)
