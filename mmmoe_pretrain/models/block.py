"""One pre-norm transformer block: attention, then a dense or a sparse feed-forward layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.config import ModelConfig, MoEConfig
from mmmoe_pretrain.models.attention import Attention, StreamPlan
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.groups import Groups


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in fp32 (arXiv 1910.07467), whatever the type of x."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), eps=1e-6).to(x.dtype)


class FeedForward(nn.Module):
    """Dense SwiGLU (arXiv 2002.05202), the shape of one expert."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(hidden_size, 2 * ffn_hidden_size, bias=False)
        self.down = nn.Linear(ffn_hidden_size, hidden_size, bias=False)

    def forward(self, x_nD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_nD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Block ``index`` of the trunk; sparse where ``is_sparse`` says so."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, index: int, groups: Groups) -> None:
        super().__init__()
        size = model.hidden_size
        self.attention_norm = RMSNorm(size)
        self.attention = Attention(size, model.num_heads)
        self.ffn_norm = RMSNorm(size)
        self.ffn: MoELayer | FeedForward
        if is_sparse(moe, index):
            self.ffn = MoELayer(moe, size, index, groups)
        else:
            self.ffn = FeedForward(size, dense_width(model, moe, index))

    def forward(self, x_nD: Tensor, plan: StreamPlan) -> tuple[Tensor, RoutingStats | None]:
        """[n, D] -> ([n, D], routing sums of a sparse block)."""
        x_nD = x_nD + self.attention(self.attention_norm(x_nD), plan)
        h_nD = self.ffn_norm(x_nD)
        if isinstance(self.ffn, MoELayer):
            y_nD, stats = self.ffn(h_nD, plan.tokens)
            return x_nD + y_nD, stats
        return x_nD + self.ffn(h_nD), None


def has_mixture_place(moe: MoEConfig, index: int) -> bool:
    """Block ``index`` is one of every ``moe.every``-th, the last of each group."""
    return (index + 1) % moe.every == 0


def is_sparse(moe: MoEConfig, index: int) -> bool:
    return has_mixture_place(moe, index) and not moe.dense


def dense_width(model: ModelConfig, moe: MoEConfig, index: int) -> int:
    """Hidden size of a dense block; with one expert its place keeps the expert's size."""
    return moe.expert_hidden_size if has_mixture_place(moe, index) else model.ffn_hidden_size
