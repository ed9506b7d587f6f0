"""Triton kernels for GPUs; each is one small file and names the PyTorch function that it replaces.

``usable`` decides, by the tensor at hand. The kernels always compute in fp32 and round once, at the end; the PyTorch
functions round after every operation.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

log = logging.getLogger(__name__)
TYPES = (torch.bfloat16, torch.float16, torch.float32)


def usable(x: Tensor) -> bool:
    """True on a GPU where Triton works. Under torch.compile and under a dispatch mode (fake tensors, a counter of
    operations) the PyTorch function runs, which they can see into."""
    return (
        x.device.type == "cuda"
        and x.dtype in TYPES
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and triton_works()
    )


@functools.cache
def triton_works() -> bool:
    """Whether Triton is installed, with a C compiler and Python's headers for its launchers. Container images often
    lack these, and the first kernel would then fail."""
    if importlib.util.find_spec("triton") is None:
        return False
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's, as Triton reads it
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    missing = [
        *([] if "CC" in os.environ or shutil.which("gcc") or shutil.which("clang") else ["a C compiler (gcc)"]),
        *([] if header.is_file() else [f"Python's headers ({header})"]),
    ]
    if missing:
        log.warning(
            "PyTorch functions are used instead of the faster Triton kernels, because these are missing: %s",
            " and ".join(missing),
        )
    return not missing
