"""Bytes from the first rank of a model replica to its other ranks, sent while these compute.

A replica is the tensor and pipeline ranks with one data-parallel rank. Its channel is a gloo group of its own, beside
NCCL, too, so that its broadcasts mix with no other collective.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from mmmoe_pretrain.parallel.groups import Group, Groups
from mmmoe_pretrain.parallel.runtime import unbound_device

HEADER = 64  # bytes; the content behind it is aligned
_LENGTH = struct.Struct("<q")
_GRAIN = 1 << 16
TIMEOUT = timedelta(hours=6)


class ReplicaChannel:
    """Frames of bytes, one at a time in flight: every rank calls ``post`` and then ``finish`` for each.

    All ranks broadcast as many bytes as the frame before had, and a little more, so that receivers can post theirs
    before they know the length; what does not fit follows in a second broadcast.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.is_source = dist.get_rank(group) == 0
        self._room = _GRAIN
        self._frame = torch.empty(0, dtype=torch.uint8)
        self._works: list[dist.Work] = []

    def post(self, content: Sequence[bytes | memoryview] = ()) -> None:
        """Begin the next frame: the source gives its ``content`` in pieces, the others nothing."""
        assert not self._works, "post without the finish of the frame before"
        length = sum(map(len, content))
        size = max(self._room, HEADER + length)
        if len(self._frame) < size:  # the source uses its memory again: new memory costs more than the copy into it
            self._frame = torch.empty(size, dtype=torch.uint8)
        if self.is_source:
            view = self._frame.numpy().data
            _LENGTH.pack_into(view, 0, length)
            at = HEADER
            for piece in content:
                view[at : at + len(piece)] = piece
                at += len(piece)
        self._broadcast(self._frame[: self._room])
        if self.is_source and HEADER + length > self._room:
            self._broadcast(self._frame[self._room : HEADER + length])

    def finish(self) -> memoryview:
        """The content of the frame. Raises RuntimeError if the source has ended, or the group's time is up."""
        try:
            self._wait()
            (length,) = _LENGTH.unpack_from(self._frame.numpy().data)
            if not self.is_source and HEADER + length > self._room:
                whole = torch.empty(HEADER + length, dtype=torch.uint8)
                whole[: self._room] = self._frame
                self._frame = whole
                self._broadcast(whole[self._room :])
                self._wait()
        except RuntimeError as error:
            raise RuntimeError(
                f"data from rank {dist.get_global_rank(self._group, 0)}, which loads it for this rank, did not come: "
                f"{error}. See the log of that rank"
            ) from error
        content = self._frame.numpy().data[HEADER : HEADER + length]
        if not self._room / 2 < HEADER + length <= self._room:
            self._room = -(-(HEADER + length * 9 // 8) // _GRAIN) * _GRAIN
        if not self.is_source:  # ``content`` keeps the memory
            self._frame = torch.empty(0, dtype=torch.uint8)
        return content

    def abandon(self) -> None:
        """After an error: leave what is under way to the end of the process. The destructor of the group would wait
        for the other ranks (torch 2.13), and hide the error until they end, so this group is never destroyed."""
        if self._works:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))

    def _broadcast(self, part: torch.Tensor) -> None:
        self._works.append(dist.broadcast(part, group=self._group, group_src=0, async_op=True))

    def _wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works.clear()


def build_replica_channel(groups: Groups, control: Group) -> ReplicaChannel | None:
    """The channel of this rank's replica, or None where a replica is one rank. Collective over all ranks, which
    ``control`` has.

    A rank awaits its next batch during saves, so it is the watchdog that ends a job whose source hangs.
    """
    if groups.tensor_size * groups.pipeline_size == 1:
        return None
    data_ranks = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(data_ranks, torch.tensor([groups.data_rank]), group=control)
    replicas = [
        [rank for rank, of in enumerate(data_ranks) if int(of) == number] for number in range(groups.data_size)
    ]
    with unbound_device():
        group, _ = dist.new_subgroups_by_enumeration(replicas, timeout=TIMEOUT, backend="gloo", group_desc="replica")
    return ReplicaChannel(group)
