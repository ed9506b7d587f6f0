"""One pre-norm transformer block: attention, then a dense or a sparse feed-forward layer.

Shapes: t rows of this rank: the n tokens of the stream, or under sequence parallelism a share of them. W columns of a
row between blocks: the D of the hidden state, and behind them the R of the routing memory, where there is one
(``moe/routing_memory.py``), which dense blocks hand on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain import kernels
from mmmoe_pretrain.config import ModelConfig, MoEConfig
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.models.attention import Attention, StreamPlan
from mmmoe_pretrain.moe.activation import swiglu
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.cuts import mark_partial_gradient
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.tensor import column_linear, row_linear

EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in fp32 (arXiv 1910.07467) for any type of x."""

    def __init__(self, size: int, groups: Groups = SINGLE) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        mark_partial_gradient(self.weight, groups)
        self.normalise = rms_norm  # or the same compiled: models/compiling.py

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.weight)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """[..., D], [D] -> [..., D]."""
    if kernels.usable(x):
        from mmmoe_pretrain.kernels import rms_norm as fused

        return fused.rms_norm(x, weight, EPS)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps=EPS).to(x.dtype)


class ResidualNorm(RMSNorm):
    """Adds a branch to the residual stream and normalises the sum."""

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """[t, D] and none or [t, D] -> the stream after the branch, and its normalised rows."""
        if self.normalise is rms_norm and kernels.usable(x):
            from mmmoe_pretrain.kernels import rms_norm as fused

            return fused.add_rms_norm(x, branch, self.weight, EPS)
        total = x if branch is None else x + branch
        return total, self.normalise(total, self.weight)


class FeedForward(nn.Module):
    """Dense SwiGLU (arXiv 2002.05202), the shape of one expert."""

    def __init__(self, hidden_size: int, ffn_hidden_size: int, groups: Groups = SINGLE) -> None:
        super().__init__()
        self.gate_up = column_linear(hidden_size, 2 * ffn_hidden_size, groups, blocks=(1, 1))
        self.down = row_linear(ffn_hidden_size, hidden_size, groups)
        self.activate = swiglu

    def forward(self, x_tD: Tensor) -> Tensor:
        """[t, D] -> [t, D]."""
        return self.down(self.activate(self.gate_up(x_tD)))


class Block(nn.Module):
    """Block ``index`` of the trunk; sparse where ``is_sparse`` says so."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, index: int, groups: Groups, names: StreamNames) -> None:
        super().__init__()
        size = model.hidden_size
        self.memory_size = memory_size(moe)
        self.attention_norm = ResidualNorm(size, groups)
        self.attention = Attention(size, model.num_heads, model.kv_heads, groups)
        self.ffn_norm = ResidualNorm(size, groups)
        self.ffn: MoELayer | FeedForward
        if is_sparse(moe, index):
            self.ffn = MoELayer(moe, size, index, groups, names)
        else:
            self.ffn = FeedForward(size, dense_width(model, moe, index), groups)

    def forward(self, x_tW: Tensor, plan: StreamPlan) -> tuple[Tensor, RoutingStats | None]:
        """[t, W] -> ([t, W], routing sums of a sparse block)."""
        x_tD, memory_tR = split_memory(x_tW, self.memory_size)
        x_tD, h_tD = self.attention_norm(x_tD)
        x_tD, h_tD = self.ffn_norm(x_tD, self.attention(h_tD, plan))
        stats = None
        if isinstance(self.ffn, MoELayer):
            y_tW, stats = self.ffn(h_tD, plan.tokens, memory_tR)
            y_tD, memory_tR = split_memory(y_tW, self.memory_size)
        else:
            y_tD = self.ffn(h_tD)
        x_tD = x_tD + y_tD
        return x_tD if memory_tR is None else torch.cat([x_tD, memory_tR], dim=1), stats


def memory_size(moe: MoEConfig) -> int:
    """R, 0 without a routing memory."""
    return 0 if moe.dense else moe.routing_memory_size


def split_memory(x_tW: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """The hidden states [t, D], and the routing memory [t, R] behind them."""
    if not size:
        return x_tW, None
    hidden_size = x_tW.shape[1] - size
    return x_tW[:, :hidden_size].contiguous(), x_tW[:, hidden_size:]


def stream_width(model: ModelConfig, moe: MoEConfig) -> int:
    """W, also of the messages between pipeline stages."""
    return model.hidden_size + memory_size(moe)


def has_moe_place(moe: MoEConfig, index: int) -> bool:
    """Block ``index`` is one of every ``moe.every``-th, the last of each group."""
    return (index + 1) % moe.every == 0


def is_sparse(moe: MoEConfig, index: int) -> bool:
    return has_moe_place(moe, index) and not moe.dense


def kind_of_block(moe: MoEConfig, index: int) -> object:
    """Equal for blocks that are alike."""
    return has_moe_place(moe, index), index if index in moe.layers else None


def dense_width(model: ModelConfig, moe: MoEConfig, index: int) -> int:
    """Hidden size of a dense block; with one expert its place keeps the expert's size."""
    return moe.expert_hidden_size if has_moe_place(moe, index) else model.ffn_hidden_size
