"""Bytes of live tensors, by following their storages; for real and for fake tensors alike.

Counted is what operations allocate and return, as an allocator without rounding would; not what a kernel allocates
for itself and frees before it returns.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that operations have made since and that are still held; ``peak`` of them. Each storage
    counts once, however many tensors view it."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._paused or func is torch.ops.prim.device.default:  # most calls of a fake tensor
            return func(*args, **(kwargs or {}))
        before = storages((args, kwargs))
        out = func(*args, **(kwargs or {}))
        self.count(out, before)
        return out

    def count(self, made: Any, before: set[int]) -> None:
        """The storages of the tensors in ``made``, but those that were there ``before``."""
        for x in tree_leaves(made):
            if (
                isinstance(x, Tensor)
                and x.device.type != "meta"
                and id(x.untyped_storage()) not in before | self._known
            ):
                self._see(x.untyped_storage())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What operations make does not count."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def reset_peak(self) -> None:
        """From here on ``peak`` is of what is live and comes."""
        self.peak = self.live

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def storages(values: Any) -> set[int]:
    """The ids of the storages of the tensors in ``values``."""
    return {id(x.untyped_storage()) for x in tree_leaves(values) if isinstance(x, Tensor)}
