"""What all ranks must know of each other's step: a handful of numbers, summed beside the step.

One all-reduce on the host, begun before the step and awaited behind it, so that it costs nothing. Every rank
decides from the same sums, thus alike: to stop, to end, to go back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmmoe_pretrain.checkpoint.storage import StorageError
from mmmoe_pretrain.exit_codes import Restartable
from mmmoe_pretrain.parallel.groups import Group

T = TypeVar("T")


@dataclass(frozen=True)
class Notes:
    """Of one rank, or summed over all. What only some ranks may count (samples: one rank of those that read
    the same ones; saves: rank 0) is 0 on the others."""

    stop: float = 0.0  # ranks that were told to stop
    read: float = 0.0  # samples
    bad: float = 0.0  # samples that could not be used
    cut_audio: float = 0.0  # clips
    cut_text: float = 0.0
    failed_saves: float = 0.0  # one after the other, as rank 0 counts them
    worker_restarts: float = 0.0  # of data workers since the last step


class Control:
    """``begin`` before a step, ``finish`` behind it, on every rank of ``group`` (None: this process alone)."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._sums = torch.zeros(len(dataclasses.fields(Notes)), dtype=torch.float64)
        self._work: dist.Work | None = None

    def begin(self, notes: Notes) -> None:
        """Send this rank's notes."""
        assert self._work is None, "the step before was not finished"
        self._sums = torch.tensor(dataclasses.astuple(notes), dtype=torch.float64)
        if self._group is not None:
            self._work = dist.all_reduce(self._sums, group=self._group, async_op=True)

    def finish(self) -> Notes:
        """The sums over all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return Notes(*self._sums.tolist())


def from_rank_0(group: Group, function: Callable[[], T]) -> T:
    """What ``function()`` gives on rank 0, on every rank of ``group``; its ValueError or OSError is a ValueError
    on every rank, a StorageError or Restartable if it was one.

    For what is read from disks and the environment: ranks that look by themselves may see different things.
    """
    answer: list[Any] = [None, None, ValueError]
    failure: Exception | None = None
    if group is None or dist.get_rank() == 0:
        try:
            answer[0] = function()
        except (ValueError, OSError) as error:
            kinds = [kind for kind in (StorageError, Restartable) if isinstance(error, kind)]
            failure, answer[1:] = error, [str(error), (*kinds, ValueError)[0]]
    if group is not None:
        dist.broadcast_object_list(answer, src=0, group=group)
    if answer[1] is not None:
        raise answer[2](answer[1]) from failure
    return answer[0]


def number_of_rank_0(group: Group, number: float) -> float:
    """Rank 0's, bit by bit, on every rank of ``group``: what is decided from it is decided alike."""
    if group is None:
        return number
    told = torch.tensor(number, dtype=torch.float64)
    dist.broadcast(told, src=0, group=group)
    return told.item()


def any_rank(group: Group, here: bool) -> bool:
    """Is it so on some rank? Every rank of ``group`` must ask."""
    if group is None:
        return here
    found = torch.tensor(float(here))
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
    return bool(found)
