"""Host memory in which a save waits to be written while training goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# Bytes. Torch rounds pinned memory up to a power of two, which one large block may double; of small parts any block
# but the last is full up to a part.
BLOCK, PART = 2**28, 2**24


class Staging:
    """Copies of tensors in memory that is allocated once: pinned where one of them is on a GPU.

    Neighbours stand side by side, as in the file that they are written to, so that many small ones are written
    at once. A copy has the type and shape of its tensor and is contiguous; that of a large one is in several parts,
    which follow each other.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        pinned = any(tensor.is_cuda for tensor in tensors)
        self._copies: list[Tensor] = []
        for run in _runs(part for tensor in tensors for part in _parts(tensor)):
            block = torch.empty(sum(t.nbytes for t in run), dtype=torch.uint8, pin_memory=pinned)
            block.zero_()  # its pages are there before training waits for them
            begin = 0
            for tensor in run:
                part = block[begin : begin + tensor.nbytes]
                self._copies.append(part.view(tensor.dtype).view(tensor.shape))
                begin += tensor.nbytes

    @torch.no_grad()
    def fill(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The copies, once the numbers of ``tensors`` are in them; they hold until the next call."""
        for copy, part in zip(self._copies, (part for t in tensors for part in _parts(t)), strict=True):
            copy.copy_(part, non_blocking=True)
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return self._copies


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
