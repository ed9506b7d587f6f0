"""torch.compile for the chains of elementwise operations between the matrix products of a block.

Compiled are the normalisations, the preparation of the heads (normalise, rotate, lay side by side) and
SwiGLU. Each is a function of tensors alone, without branch or communication, and serves every block and
every number of tokens by one graph. Products and attention kernels would stay the same library calls;
sizes in routing and dispatch differ from step to step.

The functions are exchanged inside the modules: names of parameters, hooks and layouts are untouched. Once
one of them has run under a dispatch mode (a counter of operations) torch always runs it uncompiled.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmmoe_pretrain.models.attention import Attention, prepare_heads
from mmmoe_pretrain.models.block import FeedForward, RMSNorm, rms_norm
from mmmoe_pretrain.moe.activation import swiglu

OFF = "TORCHDYNAMO_DISABLE"
FUNCTIONS = (rms_norm, prepare_heads, swiglu)  # that are compiled, in the order of ``exchange``


def compile_blocks(model: nn.Module, device: torch.device, backend: str | Callable[..., Any] = "inductor") -> None:
    """Let the blocks in ``model``, which is or will be on ``device``, run compiled; each function is
    compiled where it first runs (seconds).

    Raises ValueError where the default backend lacks what it needs.
    """
    if backend == "inductor":
        _check_tools(device)
    # Without a GPU the megatron engine turns the compiler off for megatron-core's own helpers
    # (``engines/megatron_setup.py``). torch looks when ``torch.compile`` is called, and never again.
    off = os.environ.pop(OFF, None)
    try:
        compiled: list[Any] = [torch.compile(function, dynamic=True, backend=backend) for function in FUNCTIONS]
    finally:
        if off is not None:
            os.environ[OFF] = off
    exchange(model, *compiled)


def exchange(model: nn.Module, normalise: Any, prepare: Any, activate: Any) -> None:
    """Let the blocks in ``model`` call these in place of ``FUNCTIONS``."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.normalise = normalise
        elif isinstance(module, Attention):
            module.prepare = prepare
        elif isinstance(module, FeedForward):
            module.activate = activate


def _check_tools(device: torch.device) -> None:
    cxx = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(cxx) is None:
        raise ValueError(
            f"train.compile blocks: on a CPU torch.compile needs a C++ compiler, and there is no {cxx!r}; "
            f"install g++, name another one in the environment variable CXX, or use train.compile none"
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError(
            "train.compile blocks: on a GPU torch.compile needs triton, which is not installed; "
            "pip install triton, or use train.compile none"
        )
