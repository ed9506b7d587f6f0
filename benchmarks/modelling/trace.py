"""The kernels of one microbatch, forward and backward: their bytes and FLOPs, from the real model on fake tensors.

A kernel is an operation of torch that computes or copies numbers, or a launch of a Triton kernel. Its bytes are those
of the tensors that it reads and writes, each once; of what a gather reads only the rows that it takes. Caches are not
modelled. A kernel belongs to a part of the model by the module that runs it; in the backward pass, by the module that
ran when its autograd node was made (nodes are numbered in their order). The microbatch's copy to the device is left
out: it is made while the microbatch before computes.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from mmmoe_pretrain.models.attention import Attention
from mmmoe_pretrain.models.block import Block, FeedForward, RMSNorm
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.plan.live import LiveTensors

aten = torch.ops.aten
PARTS = (
    "dense products", "expert products", "attention", "norms", "head preparation", "activation", "permutation",
    "residual sums", "router", "embedders", "losses and heads", "other",
)  # fmt: skip
OF_MODULE: tuple[tuple[type[nn.Module], str], ...] = (
    (PretrainingModel, "losses and heads"),
    (Block, "residual sums"),
    (RMSNorm, "norms"),
    (Attention, "head preparation"),
    (FeedForward, "activation"),
    (MoELayer, "permutation"),
    (Router, "router"),
    (Experts, "activation"),
)
OF_KERNEL = {"rms_norm": "norms", "heads": "head preparation", "swiglu": "activation", "sum_rows": "permutation"}
IN_A_BLOCK = {"residual sums", "head preparation", "activation", "permutation"}  # products there are counted apart
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}
GATHERS = {aten.index_select.default, aten.index.Tensor, aten.gather.default, aten.embedding.default}
MOVES = GATHERS | {
    aten._embedding_bag.default,
    aten._embedding_bag_forward_only.default,
}  # of rows to experts and back
OVERWRITE = {aten.copy_.default, aten.zero_.default, aten.fill_.Scalar}
FREE = {
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default,
    aten.new_empty_strided.default, aten._unsafe_view.default, aten.detach.default, aten.lift_fresh.default,
}  # fmt: skip
ATTENTION_BACKWARD = 2.5  # times the FLOPs of its forward pass: FlashAttention computes the scores again (2205.14135)


@dataclass(frozen=True)
class Kernel:
    """``size``: of a product its smallest dimension, for experts that of one expert. ``precision``: of a product."""

    part: str
    name: str
    phase: str  # forward, recomputation or backward
    bytes: float
    flops: float = 0.0
    size: float = 0.0
    precision: str = "bf16"


class Recorder(LiveTensors):
    """``kernels`` in the order in which they run. ``pairs``: of query and key in one call of attention."""

    def __init__(self, pairs: float) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self._pairs = pairs
        self._parts = ["other"]
        self._changes: list[tuple[int, str]] = []  # the number of the next autograd node, and the part from there on

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """While entered, modules say which part runs."""

        def enter(module: nn.Module, given: Any) -> None:
            if isinstance(module, PretrainingModel):
                for embedder in module.mmmoe.embedders.values():
                    embedder.__dict__["modelled_part"] = "embedders"
            known = (part for kind, part in OF_MODULE if isinstance(module, kind))
            self._enter(module.__dict__.get("modelled_part") or next(known, self._parts[-1]))

        hooks = [
            register_module_forward_pre_hook(enter),
            # always_call: recomputation stops early, by an exception
            register_module_forward_hook(lambda module, given, out: self._leave(), always_call=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def attention(self, attend: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        """``attend``, counted as one kernel of each pass by its useful FLOPs."""

        def counted(q_nHd: Tensor, *others: Any) -> Tensor:
            phase, flops = self._place()[1], 4.0 * q_nHd.shape[1] * q_nHd.shape[2] * self._pairs
            self.kernels.append(Kernel("attention", name, phase, 0.0, flops))
            if phase == "forward":
                self.kernels.append(Kernel("attention", name, "backward", 0.0, ATTENTION_BACKWARD * flops))
            with self.running("attention"):
                return attend(q_nHd, *others)

        return counted

    def launched(self, name: str, arguments: tuple[Any, ...], part: str | None = None) -> None:
        """A kernel that is no operation of torch: it reads or writes each tensor of ``arguments`` once."""
        moved = sum(size_of(x) for x in arguments if isinstance(x, Tensor))
        self.kernels.append(Kernel(part or OF_KERNEL[name.split(maxsplit=1)[0]], name, self._place()[1], moved))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if not (self._paused or func in FREE or func.is_view or func.namespace == "prim"):
            self._record(func, args, kwargs or {}, out)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        moved = bytes_of(func, args, kwargs, out)
        if not moved:
            return
        part, phase = self._place()
        if part == "other" and phase == "forward":
            return
        flops, size, precision = 0.0, 0.0, "bf16"
        if func is aten._grouped_mm.default:
            part, (flops, size) = "expert products", grouped_product(args[0], args[1], args[2])
        elif func in PRODUCTS:
            flops, size = product(*args[-2:])
            precision = "fp32" if out.dtype is torch.float32 else "bf16"
            part = "dense products" if part in IN_A_BLOCK else part
        elif func in MOVES and part == "activation":
            part = "permutation"
        self.kernels.append(Kernel(part, func.overloadpacket.__name__, phase, moved, flops, size, precision))

    def _place(self) -> tuple[str, str]:
        if torch._C._current_graph_task_id() == -1:
            return self._parts[-1], "forward"
        if len(self._parts) > 1:
            return self._parts[-1], "recomputation"
        node = torch._C._current_autograd_node()
        if node is None:  # gradients of a value that is used twice are added
            return "residual sums", "backward"
        if node.name() == "torch::autograd::AccumulateGrad":
            return "gradient sums", "backward"
        index = bisect.bisect_right(self._changes, node._sequence_nr(), key=lambda change: change[0]) - 1
        return self._changes[index][1] if index >= 0 else "other", "backward"

    @contextmanager
    def running(self, part: str) -> Iterator[None]:
        """While entered, ``part`` runs."""
        self._enter(part)
        try:
            yield
        finally:
            self._leave()

    def _enter(self, part: str) -> None:
        self._parts.append(part)
        self._changes.append((torch.autograd._get_sequence_nr(), part))

    def _leave(self) -> None:
        self._parts.pop()
        self._changes.append((torch.autograd._get_sequence_nr(), self._parts[-1]))


def size_of(x: Tensor) -> int:
    """Bytes of its numbers; of an expanded tensor those that exist."""
    own = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(own) * x.element_size()


def bytes_of(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """That an operation reads and writes."""
    read = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
    written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    moved = sum(size_of(x) for x in written) + sum(size_of(x) for x in read.values())
    if func in GATHERS:
        moved += size_of(out) - size_of(args[0])
    if func in OVERWRITE:
        moved -= size_of(args[0])
    return moved


def product(a: Tensor, b: Tensor) -> tuple[float, float]:
    """FLOPs of [.., m, k] x [.., k, n], and its smallest dimension."""
    (*batch, m, k), n = a.shape, b.shape[-1]
    return 2.0 * m * k * n * (batch[0] if batch else 1), min(m, k, n)


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> tuple[float, float]:
    """The same of ``grouped_mm`` over as many groups as ``ends``, whose rows (or summed columns) are a share each."""
    groups, (m, k), n = ends.shape[0], a.shape, b.shape[-1]
    shared = (m, k / groups, n) if b.ndim == 2 else (m / groups, k, n)
    return 2.0 * m * k * n, min(shared)
