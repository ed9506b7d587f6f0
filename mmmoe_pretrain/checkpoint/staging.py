"""Copies in host memory of what a rank writes, made while training continues.

``Staging`` holds the memory. ``Staging.start`` copies what the next forward pass may write and returns a ``Copying``
of the rest: a thread runs it, and training waits for it before it updates weights. On a GPU the copies go to pinned
memory on a stream of their own.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# Bytes. Torch rounds pinned memory up to a power of two, which one large block may double; of small parts any block
# but the last is full up to a part.
BLOCK, PART = 2**28, 2**24

_Pairs = list[tuple[Tensor, Tensor]]  # a copy, and what is copied


class Staging:
    """Memory for copies of tensors, allocated once: pinned where one of them is on a GPU.

    Small tensors are adjacent, as in the file, so that many of them are written at once. A copy has the type and
    shape of its tensor and is contiguous; that of a large one is in several parts, which follow each other.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        self._copies: list[Tensor] = []
        for run in _runs(part for tensor in tensors for part in _parts(tensor)):
            block = torch.empty(sum(t.nbytes for t in run), dtype=torch.uint8, pin_memory=self._device is not None)
            block.zero_()  # its pages are there before training waits for them
            begin = 0
            for tensor in run:
                part = block[begin : begin + tensor.nbytes]
                self._copies.append(part.view(tensor.dtype).view(tensor.shape))
                begin += tensor.nbytes

    def start(self, tensors: Sequence[Tensor], steady: Sequence[bool]) -> Copying:
        """Copy those that are not ``steady``; the others must not change until ``Copying.wait`` returns. The copies
        hold until the next call."""
        at_once: _Pairs = []
        later: _Pairs = []
        parts = ((part, stays) for t, stays in zip(tensors, steady, strict=True) for part in _parts(t))
        for copied, (part, stays) in zip(self._copies, parts, strict=True):
            (later if stays else at_once).append((copied, part))
        _copy(at_once)
        watched = [(place, tensor, tensor._version) for place, tensor in enumerate(tensors) if steady[place]]
        return Copying(self._copies, later, watched, self._device)


class Copying:
    """A copy that is being made. ``watched``: the tensors that must not change until then, by place, and their
    versions. ``device``: the GPU that holds them; what it does now is done before."""

    def __init__(
        self, copies: list[Tensor], pairs: _Pairs, watched: list[tuple[int, Tensor, int]], device: torch.device | None
    ) -> None:
        self._copies, self._pairs, self._watched = copies, pairs, watched
        self._stream: torch.cuda.Stream | None = None
        if device is not None:
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        self._over, self._abandoned = threading.Event(), False
        self.changed: list[int] = []  # after ``run``: the places of tensors that were written meanwhile

    def run(self) -> list[Tensor]:
        """In a thread: the copies, once they are whole. Raises RuntimeError where it was abandoned."""
        try:
            with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                for pairs in _blocks(self._pairs):
                    if not self._abandoned:
                        _copy(pairs)
            if self._stream is not None:
                self._stream.synchronize()
            if self._abandoned:
                raise RuntimeError("the process ended while the state was copied")
            # torch counts what its operations write to a tensor and its views, but not what goes through ``.data``.
            self.changed = [place for place, tensor, version in self._watched if tensor._version != version]
            return self._copies
        finally:
            self._pairs, self._watched = [], []
            self._over.set()

    def wait(self, timeout: float | None = None) -> float:
        """Seconds until the tensors may change, whatever became of the copy."""
        began = time.perf_counter()
        self._over.wait(timeout)
        return time.perf_counter() - began

    def abandon(self) -> None:
        """Let the thread end its copying soon."""
        self._abandoned = True


@torch.no_grad()
def _copy(pairs: _Pairs) -> None:
    """In one call, which releases the GIL once: a thread that takes it back for every tensor waits each time until
    training lets it go."""
    if pairs:
        torch._foreach_copy_([copied for copied, _ in pairs], [part for _, part in pairs], non_blocking=True)


def _blocks(pairs: _Pairs) -> Iterator[_Pairs]:
    """Runs of them of about ``BLOCK`` bytes."""
    block: _Pairs = []
    size = 0
    for pair in pairs:
        block.append(pair)
        size += pair[1].nbytes
        if size >= BLOCK:
            yield block
            block, size = [], 0
    yield block


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Views of at most ``PART`` bytes, in the order of the numbers."""
    if tensor.nbytes <= PART:
        yield tensor
        return
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor
    dim = next(d for d, n in enumerate(flat.shape) if n > 1)
    for part in flat.split(max(1, PART * flat.shape[dim] // flat.nbytes), dim):
        yield from _parts(part)


def _runs(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours that can share a block: of at most ``BLOCK`` bytes, each aligned to its type."""
    run: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if run and (size + tensor.nbytes > BLOCK or size % tensor.element_size()):
            yield run
            run, size = [], 0
        run.append(tensor)
        size += tensor.nbytes
    if run:
        yield run
