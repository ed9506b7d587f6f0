"""For development: megatron-core on a machine without CUDA.

megatron-core names CUDA in its allocations, streams and dtype checks. Where CUDA is absent, ``install`` gives the
modules of ``megatron.core`` (and no others) a stand-in for the name ``torch`` that redirects those to the CPU.
``torch`` itself is untouched, nothing happens where CUDA is present, and no arithmetic changes. It verifies numerics
and the order of collectives on gloo, not streams, overlap or speed on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

USED_MODULES = (
    "megatron.core.distributed",
    "megatron.core.distributed.finalize_model_grads",
    "megatron.core.models.backends",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.random",
)
FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros")


class _Inert:
    """A stream or event whose methods do nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., _Inert]:
        return lambda *args, **kwargs: self

    def __enter__(self) -> _Inert:
        return self

    def __exit__(self, *args: object) -> None:
        pass


class _CpuAsCuda:
    """``torch.cuda`` as megatron-core sees it on a CPU."""

    Stream = Event = _Inert
    current_device = staticmethod(lambda: "cpu")
    synchronize = staticmethod(lambda device=None: None)
    current_stream = default_stream = staticmethod(lambda device=None: _Inert())
    stream = staticmethod(lambda stream: contextlib.nullcontext())
    manual_seed = staticmethod(torch.manual_seed)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchOnCpu:
    """``torch`` as megatron-core sees it on a CPU: tensors asked for on CUDA land on the CPU."""

    def __init__(self) -> None:
        self.cuda = _CpuAsCuda()
        for name in FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return on_cpu


class _CudaTypeNames(TorchFunctionMode):
    """Megatron's optimizers recognise parameters by 'torch.cuda.FloatTensor' and the like."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def install() -> None:
    """Redirect megatron-core to the CPU; does nothing where CUDA is present. Idempotent."""
    if torch.cuda.is_available():
        return
    for name in USED_MODULES:
        importlib.import_module(name)
    stand_in = _TorchOnCpu()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in  # type: ignore[attr-defined]


@contextlib.contextmanager
def optimizer_calls() -> Iterator[None]:
    """Around the making and stepping of a Megatron optimizer."""
    if torch.cuda.is_available():
        yield
    else:
        with _CudaTypeNames():
            yield
