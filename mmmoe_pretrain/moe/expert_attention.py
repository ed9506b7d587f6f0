"""Attention among the experts of a token: each sees what the others made of it, before they are summed.

Of token n with the outputs y_1 ... y_K of its experts, computed as scaled dot-product attention (arXiv 1706.03762) of
one head over K vectors:

    h_k = y_k / rms(y_k)      z_k = y_k + O sum_j softmax_j(<Q h_k, K h_j> / sqrt(R)) V h_j      y = sum_k w_k z_k

O is 0 at the start, so that training begins with plain top-k (as adapters do, arXiv 2106.09685). Choices without an
output, over the capacity or of a null expert, are no keys and add nothing.

Shapes: n tokens, D hidden size, K experts a token, R size of queries, keys and values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6
ABSENT = -1e30  # finite: where a token has no output at all, its softmax stays a number


class ExpertAttention(nn.Module):
    """``qkv``: [3R, D] of queries, keys and values. ``out``: O, [D, R]. Whole on every tensor rank."""

    def __init__(self, hidden_size: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.qkv = nn.Linear(hidden_size, 3 * size, bias=False)
        self.out = nn.Linear(size, hidden_size, bias=False)

    def forward(self, y_nKD: Tensor, there_nK: Tensor) -> Tensor:
        """What the experts of each token tell each other, [n, K, D]: z - y. ``there_nK``: who has an output."""
        wide_nKD = y_nKD.to(torch.promote_types(y_nKD.dtype, torch.float32))
        h_nKD = F.rms_norm(wide_nKD, wide_nKD.shape[-1:], eps=EPS).to(y_nKD.dtype)
        query_nKR, key_nKR, value_nKR = self.qkv(h_nKD).split(self.size, dim=-1)
        scores_nKK = (query_nKR @ key_nKR.transpose(1, 2)).to(wide_nKD.dtype) / self.size**0.5
        shares_nKK = scores_nKK.masked_fill(~there_nK[:, None], ABSENT).softmax(-1)
        told_nKD = self.out(shares_nKK.to(value_nKR.dtype) @ value_nKR)
        return told_nKD * there_nK[..., None]


def flops(hidden_size: int, size: int, top_k: int) -> int:
    """A token, forward: the four products of each expert's output, and scores and their mix of each pair."""
    return 2 * top_k * 4 * hidden_size * size + 4 * top_k**2 * size
