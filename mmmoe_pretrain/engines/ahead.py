"""The microbatches of a step on the device: each is copied there while the device computes on the one before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmmoe_pretrain.batch import Batch, map_leaves


def copy_stream(device: torch.device) -> torch.Stream | None:
    """A stream for copies to ``device``; None on a CPU, where nothing is copied. One for the life of an engine:
    memory that was made on a stream is used again on that stream alone."""
    return None if device.type == "cpu" else torch.Stream(device=device)


class CopiedAhead:
    """``batches`` on ``device``, in order. ``copy_next``, called as soon as the forward pass of one is queued, starts
    the copy of the next; without it ``next`` copies. At most one batch is ahead."""

    def __init__(self, batches: Sequence[Batch], device: torch.device, copies: torch.Stream | None) -> None:
        self._left, self._device, self._copies = iter(batches), device, copies
        self._ahead: Batch | None = None

    def __iter__(self) -> CopiedAhead:
        return self

    def __next__(self) -> Batch:
        self.copy_next()
        if self._ahead is None:
            raise StopIteration
        batch, self._ahead = self._ahead, None
        if self._copies is not None:
            self._hand_over(batch, self._copies)
        return batch

    def copy_next(self) -> None:
        """Start the copy of the next batch, unless it is there or there is none."""
        if self._ahead is not None or (batch := next(self._left, None)) is None:
            return
        if self._copies is None:
            self._ahead = batch.to(self._device)
            return
        with self._copies:
            self._ahead = batch.to(self._device)

    def _hand_over(self, batch: Batch, copies: torch.Stream) -> None:
        """Let the current stream wait for the copies; their memory is not used again before it has used them."""
        current = torch.accelerator.current_stream(self._device)
        current.wait_stream(copies)
        map_leaves(batch, Tensor, lambda tensor: tensor.record_stream(current) or tensor)
