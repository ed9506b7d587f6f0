"""The fewest bytes that can leave a rank for another one; ``parallel/counting.py`` counts those that do."""

from __future__ import annotations

import torch
from torch import Tensor

PASSES, DIRECTIONS = 2, 2  # forward and backward; there and back


def least_bytes(expert_ids_TK: Tensor, experts: int, rank: int, ranks: int, row_bytes: int) -> int:
    """One row a (token, other rank that has an expert of it), there and back, forward and backward."""
    reached_TR = torch.zeros(expert_ids_TK.shape[0], ranks, dtype=torch.bool)
    reached_TR.scatter_(1, expert_ids_TK // (experts // ranks), True)
    reached_TR[:, rank] = False
    return int(reached_TR.sum()) * row_bytes * DIRECTIONS * PASSES
