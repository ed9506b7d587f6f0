"""The most memory that a piece of work holds beyond what was held before it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mmmoe_pretrain.plan.live import LiveTensors


def peak_of(work: Callable[[], object], device: torch.device) -> int:
    if device.type != "cuda":
        with LiveTensors() as tensors:
            work()
        return tensors.peak
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before
