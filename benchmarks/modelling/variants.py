"""What a step ran before the work on its kernels, after the first part of it, and now; for ``trace.py``.

The code of that time is not run: the same model takes today's PyTorch functions where it had no kernel.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.modelling.trace import Recorder
from mmmoe_pretrain import kernels
from mmmoe_pretrain.models import attend, attention, block, trunk
from mmmoe_pretrain.moe import experts
from mmmoe_pretrain.moe.activation import weighted
from mmmoe_pretrain.moe.expert_math import ExpertStack
from mmmoe_pretrain.moe.plan import ExpertPlan, sum_rows, take_rows
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.parallel.tensor import pad_rows
from mmmoe_pretrain.plan.gpu_paths import gpu_paths, replaced


@dataclass(frozen=True)
class Variant:
    """``kernels``: Triton's. ``varlen``: attention without padding. ``leaves_out``: experts keep their first product
    alone, blocks but the last are computed again, and only as far as needed, queries, keys and values without padding
    are not sliced, and norms add the residual stream. ``fused_adam``: torch's."""

    name: str
    kernels: bool
    varlen: bool
    leaves_out: bool
    fused_adam: bool

    @contextmanager
    def paths(self, recorder: Recorder) -> Iterator[None]:
        """While entered, a model on fake tensors takes these paths of a GPU, and ``recorder`` sees its kernels."""
        name = "varlen_attn" if self.varlen else "SDPA by buckets"
        with ExitStack() as stack:
            stack.enter_context(gpu_paths(recorder.launched))
            stack.enter_context(recorder.following_modules())
            stack.enter_context(replaced(attention, "attend", recorder.attention(attend.attend, name)))
            if not self.kernels:
                stack.enter_context(replaced(kernels, "usable", lambda x: False))
                stack.enter_context(replaced(F, "rms_norm", torch_rms_norm(recorder)))
            if not self.varlen:
                stack.enter_context(replaced(attend, "_varlen_fits", lambda q: False))
            if not self.leaves_out:
                stack.enter_context(replaced(experts, "choose_backend", lambda *of: grouped_by_autograd))
                stack.enter_context(replaced(trunk, "checkpoint", checkpoint_to_the_end))
                stack.enter_context(replaced(Stage, "recomputed", Stage.blocks))
                stack.enter_context(replaced(attention.Attention, "forward", attention_with_slice))
                stack.enter_context(replaced(block.ResidualNorm, "forward", norm_after_sum))
            yield


BEFORE = Variant("before", kernels=False, varlen=False, leaves_out=False, fused_adam=False)
BETWEEN = Variant("between", kernels=True, varlen=False, leaves_out=False, fused_adam=True)
NOW = Variant("now", kernels=True, varlen=True, leaves_out=True, fused_adam=True)


def grouped_by_autograd(x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan, stack: ExpertStack) -> Tensor:
    """Grouped products whose every tensor on the way is kept."""
    ends = torch.tensor(list(itertools.accumulate(plan.counts)), dtype=torch.int32)
    up_AF = F.grouped_mm(take_rows(x_mD, plan), stack.up_EFD.transpose(1, 2), offs=ends)
    h_AF = weighted(stack.activation, up_AF, weights_A)
    return sum_rows(F.grouped_mm(h_AF, stack.down_EDF.transpose(1, 2), offs=ends), plan)


def checkpoint_to_the_end(*given: Any, early_stop: bool, **options: Any) -> Any:
    """All of a block again."""
    return checkpoint(*given, early_stop=False, **options)


def attention_with_slice(self: attention.Attention, x_tD: Tensor, plan: attention.StreamPlan) -> Tensor:
    """``Attention.forward``, with a slice where there is no padding, too: its gradient is a copy."""
    qkv = self.qkv(x_tD)[: plan.num_valid].unflatten(1, (-1, self.head_size))
    mixed = attention.attend(*self.prepare(qkv, self.num_kv_heads, plan.cos_nh, plan.sin_nh), plan.attention)
    return self.out(pad_rows(mixed, self.groups))


def norm_after_sum(self: block.ResidualNorm, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``ResidualNorm.forward`` by two kernels."""
    total = x if branch is None else x + branch
    return total, self.normalise(total, self.weight)


def torch_rms_norm(recorder: Recorder) -> Any:
    """``torch.nn.functional.rms_norm`` as torch runs it on a GPU: one kernel forward, and backward one for its input
    and one for its weight. On fake tensors of a CPU it would be a chain of operations."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor | None) -> Tensor:
            out, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
            recorder.launched("torch's rms_norm", (x, weight, out, scale), part_of(weight))
            ctx.save_for_backward(x, weight, scale)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
            x, weight, scale = ctx.saved_tensors
            grad_x = torch.empty_like(x)
            part = part_of(weight)
            recorder.launched("torch's rms_norm backward", (grad, x, weight, scale, grad_x), part)
            if weight is None:
                return grad_x, None
            recorder.launched("torch's rms_norm backward of its weight", (grad, x, scale, weight), part)
            return grad_x, torch.empty_like(weight)

    def part_of(weight: Tensor | None) -> str:
        return "head preparation" if weight is None else "norms"

    def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        return Fused.apply(x, weight)

    return rms_norm
