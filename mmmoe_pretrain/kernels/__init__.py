"""Triton kernels for GPUs; each is one small file and names the PyTorch function that it replaces.

``usable`` decides, by the tensor at hand. The kernels compute in fp32 whatever the type of their inputs, and
round once, at the end; the PyTorch functions round after every operation.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

TYPES = (torch.bfloat16, torch.float16, torch.float32)


def usable(x: Tensor) -> bool:
    """True on a GPU with Triton. Under torch.compile and under a dispatch mode (fake tensors, a counter of
    operations) the PyTorch function runs, which they can see into."""
    return (
        x.device.type == "cuda"
        and x.dtype in TYPES
        and _has_triton()
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
    )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
