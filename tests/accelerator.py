"""A pretended accelerator: it finds where the host would wait for a device, without having one.

Fake tensors know shapes, types and devices, and compute nothing. torch lends them a device, "gpu", whose autograd
works in a CPU build. Where the host would read a number from the device, or copies to it from memory that is not
pinned, ``Host`` notes the place, and answers with a number that is possible. A process that has pretended a device
must be one of its own: the backend cannot be taken back.
"""

from __future__ import annotations

import collections
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GPU = "gpu"
PINNED = "pretends_to_be_pinned"
SIZED_BY_NUMBERS = {
    aten.nonzero.default, aten._unique2.default, aten.unique_dim.default, aten.masked_select.default,
    aten.bincount.default, aten.equal.default,
}  # fmt: skip
OURS = re.compile(r"(mmmoe_pretrain/\S+?\.py)")


def pretend() -> torch.device:
    """Let torch know the device; once in a process."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(GPU)
    # Else constants are made on the device in earnest, where no kernel is.
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment,method-assign]
    return torch.device(GPU, 0)


@contextmanager
def fake_tensors() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def move(model: nn.Module, device: torch.device) -> None:
    """``model.to(device)`` for fake tensors, whose ``.data`` cannot change its device."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = nn.Parameter(parameter.detach().to(device))
                new.__dict__.update({k: v for k, v in parameter.__dict__.items() if k not in new.__dict__})
                module._parameters[name] = new
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


class Host(TorchDispatchMode):
    """By place in the code: ``reads`` of numbers, and ``waits`` for copies from memory that is not pinned.
    ``copies``: how many copies to the device did not wait. ``answer``: of a tensor whose numbers are read at once.
    ``log``: gets a line for each copy to the device, and each tensor whose memory is kept for a stream."""

    def __init__(
        self, answer: Callable[[Tensor], Any] = lambda tensor: [1] * tensor.numel(), log: list[str] | None = None
    ) -> None:
        super().__init__()
        self.reads: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.copies, self._answer, self._log = 0, answer, [] if log is None else log

    @contextmanager
    def watching(self) -> Iterator[Host]:
        plain, host = FakeTensor.tolist, self

        def tolist(tensor: FakeTensor) -> Any:
            if tensor.device.type != GPU:
                return plain(tensor)
            host.reads[place()] += 1  # of all its numbers at once
            return host._answer(tensor)

        FakeTensor.tolist = tolist  # type: ignore[method-assign]
        try:
            with self:
                yield self
        finally:
            FakeTensor.tolist = plain  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.is_pinned.default:
            return hasattr(args[0], PINNED)
        if func is aten._pin_memory.default:
            pinned = aten.clone.default(args[0])
            setattr(pinned, PINNED, True)
            return pinned
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is aten.record_stream.default:
            return self._log.append("memory kept")
        here = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.device.type == GPU for t in here):
            if func is aten._local_scalar_dense.default:
                self.reads[place()] += 1
                return 1 if not args[0].dtype.is_floating_point else 1.0
            if func in SIZED_BY_NUMBERS or _by_mask(func, args, kwargs):
                self.reads[place()] += 1
                if func is aten.nonzero.default:
                    return args[0].new_empty((1, args[0].ndim), dtype=torch.int64)
        out = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            self._note_copy(args[func is aten.copy_.default], out, args, kwargs)
        return out

    def _note_copy(self, source: Tensor, out: Tensor, args: Any, kwargs: Any) -> None:
        if source.device.type == GPU and out.device.type == "cpu":
            self.reads[place()] += 1
        elif source.device.type == "cpu" and out.device.type == GPU:
            free = hasattr(source, PINNED) and (kwargs.get("non_blocking") or True in args[2:])
            self.copies += free
            self._log.append("copy")
            self.waits[place()] += not free


def _by_mask(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the size of the result is the number of True in an index."""
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None


def place() -> str:
    """The innermost file and function of the project that runs, or the node whose backward pass runs."""
    for frame in reversed(traceback.extract_stack()):
        if found := OURS.search(frame.filename):
            return f"{found[1]}:{frame.name}"
    node = torch._C._current_autograd_node()
    return "backward" if node is None else f"backward of {node.name()}"
