"""Parts that the image and the audio stem share.

Owns the channel norm and the widths of a stem. Both work on zero rows, where torch gives every
parameter a gradient of zeros: an absent modality needs no special path (design, decision 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

EPS = 1e-5
CONSTANT = 1e-4  # variance; of channels that vary more, the norm makes values of about 1


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every place apart: [n, C, ...] -> the same shape.

    Places never mix, so padded frames cannot leak into valid ones. Channels that are all equal, as those of silence
    are under biases of zero, get no gradient: the norm's derivative there is 1 / sqrt(eps) = 316, and the norms of a
    stem would multiply it to 1e13.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        last = x.movedim(1, -1)
        out, _, rstd = torch.native_layer_norm(last, last.shape[-1:], self.weight, self.bias, EPS)
        if last.requires_grad:
            varies = rstd.detach() < (CONSTANT + EPS) ** -0.5
            last.register_hook(lambda gradient: gradient * varies)
        return out.movedim(-1, 1)


def stem_widths(first: int, steps: int, limit: int) -> list[int]:
    """Channels after each halving: ``first`` doubled at every step, never above ``limit``."""
    return [min(first * 2**i, limit) for i in range(steps)]


def conv_stem_flops(
    widths: Sequence[int], places: Sequence[int], kernel: int, residual_kernel: int, hidden_size: int
) -> float:
    """FLOPs a token of steps that halve to ``places`` a token each, a residual layer after each of the last two, and
    a product with [width, hidden_size]. ``widths``: channels before the first step and after each."""
    flops = 2.0 * widths[-1] * hidden_size
    for step, count in enumerate(places):
        residual = residual_kernel * widths[step + 1] ** 2 if step >= len(places) - 2 else 0
        flops += 2 * count * (kernel * widths[step] * widths[step + 1] + residual)
    return flops
