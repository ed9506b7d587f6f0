"""Bytes that leave a rank for another rank: counted, and the fewest that can be.

The count sees every collective below Python, whoever calls it. What a rank sends to itself is left
out for everybody.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PASSES, DIRECTIONS = 2, 2  # forward and backward; there and back


class Traffic(TorchDispatchMode):
    """Sums the bytes of this rank's collectives while it is entered.

    An all-reduce counts as a ring's, 2 (R - 1) / R of the tensor. A collective it does not know raises
    NotImplementedError, so that none goes uncounted.
    """

    def __init__(self, rank: int, ranks: int) -> None:
        super().__init__()
        self.rank, self.ranks, self.sent = rank, ranks, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.sent += self._bytes(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _bytes(self, name: str, args: Any) -> float:
        if name == "alltoall_base_":
            return self._all_to_all(args[1], args[4])
        if name == "_allgather_base_":
            return (self.ranks - 1) * args[1].nbytes
        if name == "allreduce_":
            return 2 * (self.ranks - 1) / self.ranks * sum(tensor.nbytes for tensor in args[0])
        raise NotImplementedError(f"traffic of the collective {name}")

    def _all_to_all(self, sent: Tensor, splits: list[int]) -> int:
        rows = sent.shape[0]
        own = splits[self.rank] if splits else rows // self.ranks
        return sent.nbytes // max(1, rows) * (rows - own)


def least_bytes(expert_ids_TK: Tensor, experts: int, rank: int, ranks: int, row_bytes: int) -> int:
    """One row a (token, other rank that has an expert of it), there and back, forward and backward."""
    reached_TR = torch.zeros(expert_ids_TK.shape[0], ranks, dtype=torch.bool)
    reached_TR.scatter_(1, expert_ids_TK // (experts // ranks), True)
    reached_TR[:, rank] = False
    return int(reached_TR.sum()) * row_bytes * DIRECTIONS * PASSES
