"""Experts: SwiGLU feed-forward networks with stacked weights, computed by grouped products.

Owns the weights of the experts of this rank and the arithmetic over tokens sorted by expert;
knows nothing of routing or communication. Shapes: x_nD sorted by local expert, n rows in all.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUPED_ALIGNMENT = 16  # bytes; torch.nn.functional.grouped_mm wants the inner sizes to be multiples


class Experts(nn.Module):
    """E_local experts, y = (silu(x W_gate) * (x W_up)) W_down (SwiGLU, arXiv 2002.05202).

    ``gate_up``: [E_local, D, 2F]. ``down``: [E_local, F, D]. Both are marked so that the engines
    reduce their gradients over the replicas of the expert alone.
    """

    def __init__(self, local_experts: range, hidden_size: int, expert_hidden_size: int) -> None:
        super().__init__()
        count = len(local_experts)
        self.local_experts = local_experts
        self.gate_up = nn.Parameter(torch.empty(count, hidden_size, 2 * expert_hidden_size))
        self.down = nn.Parameter(torch.empty(count, expert_hidden_size, hidden_size))
        for weight in (self.gate_up, self.down):
            weight.allreduce = False  # type: ignore[attr-defined]  # megatron-core's mark of an expert

    def forward(self, x_nD: Tensor, counts: list[int]) -> Tensor:
        """[n, D] -> [n, D]; ``counts[e]`` rows belong to local expert e."""
        gate, up = grouped_linear(x_nD, self.gate_up, counts).chunk(2, dim=-1)
        return grouped_linear(F.silu(gate) * up, self.down, counts)


def grouped_linear(x_nI: Tensor, weight_EIO: Tensor, counts: list[int]) -> Tensor:
    """Rows of group e times ``weight_EIO[e]``; [n, I] -> [n, O].

    One grouped product where torch has it for this shape and type, else a product an expert.
    An expert without rows still takes part, so that it always has a gradient (of zeros).
    """
    if _grouped_mm_fits(x_nI, weight_EIO):
        ends = torch.tensor(counts, device=x_nI.device).cumsum(0).to(torch.int32)
        return _WithDenseGradient.apply(F.grouped_mm(x_nI, weight_EIO, offs=ends))
    parts = x_nI.split(counts)
    return torch.cat([part @ weight for part, weight in zip(parts, weight_EIO.unbind(0), strict=True)])


class _WithDenseGradient(torch.autograd.Function):
    """The identity; its backward pass makes the gradient contiguous, as that of grouped_mm needs
    (torch 2.13 refuses an expanded one, such as that of a plain sum)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _grouped_mm_fits(x_nI: Tensor, weight_EIO: Tensor) -> bool:
    row_bytes = [size * x_nI.element_size() for size in weight_EIO.shape[1:]]
    return (
        hasattr(F, "grouped_mm")
        and x_nI.shape[0] > 0
        and x_nI.dtype in (torch.float32, torch.bfloat16)
        and all(size % GROUPED_ALIGNMENT == 0 for size in row_bytes)
    )
