"""Small tables from the host to the device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of ``values``. From pinned memory, since a copy from other memory ends with the host
    waiting for all that the device has been given to do."""
    table = torch.tensor(values, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
