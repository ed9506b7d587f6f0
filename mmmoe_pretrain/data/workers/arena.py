"""Values in shared memory: what data workers make, read by another worker or by the rank without a copy.

An ``Arena`` is a sparse file in memory (memfd) that forked processes inherit, cut into slots that are larger than any
value, so that a slot takes the memory of what was written into it. The rank alone assigns slots; a message names one.
"""

from __future__ import annotations

import functools
import mmap
import os
import pickle
import resource
import struct
import weakref
from collections import deque
from typing import Any

from mmmoe_pretrain.data.storage.local import descriptors

STRIDE = 1 << 36  # addresses, not memory
ALIGNMENT = 64
MAX_MAPS = 128  # that a process keeps of an arena: each takes a descriptor
SHARE_OF_DESCRIPTORS = 8  # at most one in so many of those that the process may have
MIN_MAP_BITS = 16
_COUNT = struct.Struct("<Q")


def dump(value: object) -> list[bytes | memoryview]:
    """``value`` as pieces of bytes, the contents of arrays not copied: the number of parts and their sizes, then each
    part at a multiple of ALIGNMENT. The first part is a pickle, the others are the arrays."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(head), *(buffer.raw() for buffer in buffers)]
    sizes = [len(part) for part in parts]
    pieces: list[bytes | memoryview] = [struct.pack(f"<{1 + len(sizes)}Q", len(sizes), *sizes)]
    at = len(pieces[0])
    for part in parts:
        pieces += [bytes(-at % ALIGNMENT), part]
        at += -at % ALIGNMENT + len(part)
    return pieces


def load(data: memoryview) -> Any:
    """The value of ``dump``, whose arrays are views of ``data``."""
    (count,) = _COUNT.unpack_from(data)
    sizes = struct.unpack_from(f"<{count}Q", data, _COUNT.size)
    at, parts = _COUNT.size * (1 + count), []
    for size in sizes:
        at += -at % ALIGNMENT
        parts.append(data[at : at + size])
        at += size
    return pickle.loads(parts[0], buffers=parts[1:])


class Slots:
    """The slots of one arena, in a process that writes and reads them. Their maps are kept: the kernel takes longer
    to map a value and to fault its pages in than to copy it."""

    def __init__(self, descriptor: int) -> None:
        most = descriptors(MAX_MAPS, SHARE_OF_DESCRIPTORS)
        self._mapped = functools.lru_cache(most)(functools.partial(mapped, descriptor))

    def write(self, slot: int, value: object) -> int:
        """Write ``value`` into ``slot``, which ``Arena.take`` gave; its length."""
        pieces = dump(value)
        length, at = sum(map(len, pieces)), 0
        content = self._content(slot, length)
        for piece in pieces:
            content[at : at + len(piece)] = piece
            at += len(piece)
        return length

    def load(self, slot: int, length: int) -> Any:
        """The value in ``slot``; its arrays are valid until the slot is given back."""
        return load(self._content(slot, length))

    def _content(self, slot: int, length: int) -> memoryview:
        size = 1 << max(MIN_MAP_BITS, (length - 1).bit_length())
        return memoryview(self._mapped(slot, size))[:length]


def mapped(descriptor: int, slot: int, length: int) -> mmap.mmap:
    """The value in a slot. Its memory stays valid as long as the map or an array of ``load`` is there."""
    return mmap.mmap(descriptor, length, offset=slot * STRIDE)


class Arena:
    """The slots of one arena, in the rank. Memory of free slots is used again; beyond ``most`` bytes in all it is
    given back. Not thread-safe, but for the end of what was lent."""

    def __init__(self, most: int) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if limit != resource.RLIM_INFINITY:
            raise ValueError(
                f"data workers share memory through sparse files, and files may have {limit} bytes (ulimit -f); "
                f"start with ulimit -f unlimited, or set data.num_workers 0"
            )
        self._most = most
        self.descriptor = os.memfd_create("mmmoe data")
        self._free: list[int] = []
        self._slots = 0
        self._memory: dict[int, int] = {}  # bytes of a slot, used now or before
        self._used: dict[int, int] = {}  # bytes of the values that are there
        self._lent: dict[int, weakref.ref[mmap.mmap]] = {}
        self._ended: deque[int] = deque()  # slots whose last view is gone: any thread may append

    def take(self) -> int:
        """A slot to write into."""
        self._end_lent()
        if self._free:
            return self._free.pop()
        self._slots += 1
        os.ftruncate(self.descriptor, self._slots * STRIDE)
        return self._slots - 1

    def written(self, slot: int, length: int) -> None:
        """A value of ``length`` bytes is in ``slot``."""
        self._used[slot] = length
        self._memory[slot] = max(length, self._memory.get(slot, 0))

    def give_back(self, slot: int) -> None:
        """The value in ``slot`` is no longer needed."""
        self._used.pop(slot, None)
        if sum(self._memory.values()) > self._most:
            self._drop_memory(slot)
        self._free.append(slot)

    def recover(self, slot: int) -> None:
        """``slot`` may hold a part of a value, whose writer has ended."""
        start = slot * STRIDE
        self._memory[slot] = os.lseek(self.descriptor, start, os.SEEK_HOLE) - start  # a value has none
        self._drop_memory(slot)
        self._free.append(slot)

    def lend(self, slot: int) -> memoryview:
        """The value in ``slot``, which is given back with the last view of it."""
        content = mapped(self.descriptor, slot, self._used.pop(slot))
        ended = self._ended
        self._lent[slot] = weakref.ref(content, lambda _: ended.append(slot))
        return memoryview(content)

    @property
    def used(self) -> int:
        """Bytes of the values that are there and not lent."""
        return sum(self._used.values())

    def close(self) -> None:
        """Give all memory back, except what is lent: that with its last view."""
        self._end_lent()
        for slot in list(self._memory.keys() - self._lent.keys()):
            self._drop_memory(slot)
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def _end_lent(self) -> None:
        while self._ended:
            slot = self._ended.popleft()
            del self._lent[slot]
            self.give_back(slot)

    def _drop_memory(self, slot: int) -> None:
        length = self._memory.pop(slot, 0)
        if length:
            with mapped(self.descriptor, slot, length) as content:
                content.madvise(mmap.MADV_REMOVE)
