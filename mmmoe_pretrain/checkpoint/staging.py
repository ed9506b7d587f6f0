"""Host memory in which a save waits to be written while training goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

PINNED_BLOCK = 2**28  # bytes; torch rounds pinned memory up to a power of two, which one large block may double


class Staging:
    """Copies of tensors in memory that is allocated once: pinned where one of them is on a GPU.

    Neighbours stand side by side, as in the file that they are written to, so that many small ones are written
    at once. A copy has the type and shape of its tensor and is contiguous.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        pinned = any(tensor.is_cuda for tensor in tensors)
        self._copies: list[Tensor] = []
        for run in _runs(tensors, PINNED_BLOCK if pinned else None):
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
        for copy, tensor in zip(self._copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return self._copies


def _runs(tensors: Sequence[Tensor], limit: int | None) -> Iterator[list[Tensor]]:
    """Neighbours that can share a block: of at most ``limit`` bytes, each aligned to its type."""
    run: list[Tensor] = []
    size = 0
    for tensor in tensors:
        full = limit is not None and size + tensor.nbytes > limit
        if run and (full or size % tensor.element_size()):
            yield run
            run, size = [], 0
        run.append(tensor)
        size += tensor.nbytes
    if run:
        yield run
