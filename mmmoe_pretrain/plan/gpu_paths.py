"""The model's paths of a GPU, on fake tensors of a machine without one: what it would allocate and keep there.

A model asks at three places where it runs; in ``gpu_paths`` the answer is a CUDA GPU of compute capability 8.0 or
higher with Triton. The functions around the Triton kernels are the real ones, with launches that do nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mmmoe_pretrain import kernels
from mmmoe_pretrain.models import attend
from mmmoe_pretrain.moe import experts
from mmmoe_pretrain.moe.expert_math import ExpertMath, ExpertStack, grouped_mm, grouped_mm_fits
from mmmoe_pretrain.moe.plan import ExpertPlan

# The name of a kernel that would be launched, and its arguments.
Launched = Callable[[str, tuple[Any, ...]], None]
KERNELS = ("heads", "rms_norm", "sum_rows", "swiglu")


@contextmanager
def gpu_paths(launched: Launched = lambda name, arguments: None) -> Iterator[None]:
    """Within a FakeTensorMode, whose numbers nobody reads."""
    with ExitStack() as stack:
        stack.enter_context(replaced(kernels, "usable", lambda x: x.dtype in kernels.TYPES))
        stack.enter_context(replaced(attend, "_varlen_fits", _varlen_fits))
        stack.enter_context(replaced(experts, "choose_backend", _choose_backend))
        for name in KERNELS:
            stack.enter_context(replaced(kernels, name, _without_launches(name, launched)))
        yield


@contextmanager
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """``value`` as attribute ``name`` of ``owner`` while it is entered."""
    missing = object()
    before = getattr(owner, name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _varlen_fits(q_nHd: Tensor) -> bool:
    return q_nHd.dtype in attend.VARLEN_TYPES and q_nHd.shape[-1] in attend.VARLEN_HEAD_SIZES


def _choose_backend(name: str, x_mD: Tensor, plan: ExpertPlan, stack: ExpertStack) -> ExpertMath:
    half = x_mD.dtype is torch.bfloat16 and grouped_mm_fits(x_mD, plan, stack)
    return grouped_mm if half and name in ("auto", "grouped_mm") else experts.blocked


def _without_launches(name: str, launched: Launched) -> ModuleType:
    """A module of ``kernels/``, whose kernels need no Triton and do nothing."""
    spec = importlib.util.spec_from_file_location(f"{__name__}.{name}", Path(kernels.__file__).parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    triton, language = _Triton(name, launched), ModuleType("triton.language")
    known = {key: sys.modules.get(key) for key in (triton.__name__, language.__name__)}
    sys.modules |= {triton.__name__: triton, language.__name__: language}
    try:
        spec.loader.exec_module(module)
    finally:
        for key, before in known.items():
            if before is None:
                del sys.modules[key]
            else:
                sys.modules[key] = before
    return module


class _Triton(ModuleType):
    """What the module ``name`` of ``kernels/`` uses of Triton on the host."""

    language = ModuleType("triton.language")

    def __init__(self, name: str, launched: Launched) -> None:
        super().__init__("triton")
        self._name, self._launched = name, launched

    def jit(self, function: Callable[..., None]) -> _Kernel:
        """``rms_norm forward`` of ``forward_kernel`` in ``rms_norm.py``."""
        return _Kernel(f"{self._name} {function.__name__.removesuffix('_kernel')}", self._launched)

    @staticmethod
    def cdiv(a: int, b: int) -> int:
        return -(-a // b)

    @staticmethod
    def next_power_of_2(n: int) -> int:
        return 1 << (n - 1).bit_length()


class _Kernel:
    def __init__(self, name: str, launched: Launched) -> None:
        self._name, self._launched = name, launched

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: self._launched(self._name, arguments)
