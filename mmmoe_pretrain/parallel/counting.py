"""Counts the collectives of a rank: every call of torch.distributed below Python, including those of megatron-core,
DeepSpeed and backward passes. A coalesced call is one call.

Bytes are those that leave this rank for another one; what a rank sends to itself is not counted. All-reduce,
reduce-scatter and all-gather count as rings over the R ranks of the group: 2 (R - 1) / R of the tensor,
(R - 1) / R of the whole and (R - 1) times the own part (``RING``), the least that any algorithm can do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALL_TO_ALL, ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER = "all-to-all", "all-reduce", "reduce-scatter", "all-gather"
BROADCAST, POINT_TO_POINT, BARRIER = "broadcast", "point-to-point", "barrier"

# Of R ranks: bytes that leave each, over the bytes that go in: the tensor, the whole, the own part.
RING: dict[str, Callable[[int], float]] = {
    ALL_REDUCE: lambda ranks: 2 * (ranks - 1) / ranks,
    REDUCE_SCATTER: lambda ranks: (ranks - 1) / ranks,
    ALL_GATHER: lambda ranks: ranks - 1.0,
}

Ranks = tuple[int, ...]  # global ranks, rising


@dataclass(frozen=True)
class Call:
    """One call. ``ranks``: of its group; of a point-to-point message, the sender and the receiver."""

    kind: str
    ranks: Ranks
    sent: float  # bytes


@dataclass(frozen=True)
class Total:
    """The totals of several calls."""

    calls: int = 0
    sent: float = 0.0

    def __add__(self, other: Total) -> Total:
        return Total(self.calls + other.calls, self.sent + other.sent)


class CollectiveCounter(TorchDispatchMode):
    """Collects this rank's ``calls`` while it is entered, in groups of more than one rank; others move
    nothing. A message counts where it is sent. What is not known here raises NotImplementedError, so that
    nothing goes uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._note(func._schema, args)
        elif func.namespace.startswith("_c10d_functional") and "wait_tensor" not in func._schema.name:
            raise NotImplementedError(f"the traffic of {func._schema.name}; parallel/counting.py knows c10d's calls")
        return func(*args, **(kwargs or {}))

    @property
    def sent(self) -> float:
        """Bytes of all calls."""
        return sum(call.sent for call in self.calls)

    def totals(self) -> dict[tuple[str, Ranks], Total]:
        """The totals by kind and ranks."""
        found: dict[tuple[str, Ranks], Total] = defaultdict(Total)
        for call in self.calls:
            found[call.kind, call.ranks] += Total(1, call.sent)
        return dict(found)

    def _note(self, schema: Any, args: Any) -> None:
        name = schema.name.removeprefix("c10d::")
        if name in SILENT:
            return
        place = [argument.name for argument in schema.arguments].index("process_group")
        group = dist.ProcessGroup.unbox(args[place])
        if group.size() == 1:
            return
        if name not in COUNTED:
            raise NotImplementedError(f"the traffic of {schema.name}; known are {', '.join(sorted(COUNTED))}")
        kind, sent = COUNTED[name]
        ranks = dist.get_process_group_ranks(group)
        if kind == POINT_TO_POINT:
            ranks = [dist.get_rank(), ranks[args[2]]]
        self.calls.append(Call(kind, tuple(sorted(ranks)), sent(args, group.size(), group.rank())))


def _nbytes(tensors: Any) -> int:
    """The bytes of a tensor, or of lists of tensors."""
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(_nbytes, tensors))


def _ring(kind: str, place: int) -> Callable[[Any, int, int], float]:
    """``place``: of the argument that goes in."""
    return lambda args, ranks, rank: RING[kind](ranks) * _nbytes(args[place])


def _all_to_all_rows(args: Any, ranks: int, rank: int) -> float:
    sent, splits = args[1], args[4]
    rows = sent.shape[0]
    own = splits[rank] if splits else rows // ranks
    return sent.nbytes // max(1, rows) * (rows - own)


def _all_to_all_list(args: Any, ranks: int, rank: int) -> float:
    return _nbytes(args[1]) - _nbytes(args[1][rank])


def _broadcast(args: Any, ranks: int, rank: int) -> float:
    """A pipelined chain of ranks: all but the last one send."""
    return (ranks - 1) / ranks * _nbytes(args[0])


SILENT = ("recv_", "recv_any_source_", "check_for_nan", "monitored_barrier_")
COUNTED: dict[str, tuple[str, Callable[[Any, int, int], float]]] = {
    "allreduce_": (ALL_REDUCE, _ring(ALL_REDUCE, 0)),
    "allreduce_coalesced_": (ALL_REDUCE, _ring(ALL_REDUCE, 0)),
    "_reduce_scatter_base_": (REDUCE_SCATTER, _ring(REDUCE_SCATTER, 1)),
    "reduce_scatter_": (REDUCE_SCATTER, _ring(REDUCE_SCATTER, 1)),
    "reduce_scatter_tensor_coalesced_": (REDUCE_SCATTER, _ring(REDUCE_SCATTER, 1)),
    "_allgather_base_": (ALL_GATHER, _ring(ALL_GATHER, 1)),
    "allgather_": (ALL_GATHER, _ring(ALL_GATHER, 1)),
    "allgather_coalesced_": (ALL_GATHER, _ring(ALL_GATHER, 1)),
    "allgather_into_tensor_coalesced_": (ALL_GATHER, _ring(ALL_GATHER, 1)),
    "alltoall_base_": (ALL_TO_ALL, _all_to_all_rows),
    "alltoall_": (ALL_TO_ALL, _all_to_all_list),
    "broadcast_": (BROADCAST, _broadcast),
    "send": (POINT_TO_POINT, lambda args, ranks, rank: float(_nbytes(args[0]))),
    "barrier": (BARRIER, lambda args, ranks, rank: 0.0),
}
