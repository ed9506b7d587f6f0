"""Parts that the image and the audio stem share.

Owns the channel norm and the widths of a stem. Both work on zero rows, where torch gives every
parameter a gradient of zeros: an absent modality needs no special path (design, decision 2).
"""

from __future__ import annotations

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
