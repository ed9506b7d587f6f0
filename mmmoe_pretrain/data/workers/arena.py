"""Values in shared memory: what data workers make, read by another worker or by the rank without a copy.

An ``Arena`` is a sparse file in memory (memfd) that forked processes inherit, cut into slots that are larger than any
value, so that a slot takes the memory of what was written into it. The rank alone assigns slots; a message names one.
"""

from __future__ import annotations

import mmap
import os
import pickle
import resource
import struct
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

STRIDE = 1 << 36  # addresses, not memory
ALIGNMENT = 64
_IOV_MAX = 1024
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


def write(descriptor: int, slot: int, value: object) -> int:
    """Write ``value`` into a slot of the arena ``descriptor``; its length."""
    at = start = slot * STRIDE
    pieces = [piece for piece in dump(value) if len(piece)]
    while pieces:
        done = os.pwritev(descriptor, pieces[:_IOV_MAX], at)
        at += done
        pieces = _after(pieces, done)
    return at - start


def _after(pieces: Sequence[bytes | memoryview], done: int) -> list[bytes | memoryview]:
    """What is left of ``pieces`` after their first ``done`` bytes."""
    for number, piece in enumerate(pieces):
        if done < len(piece):
            return [memoryview(piece)[done:], *pieces[number + 1 :]]
        done -= len(piece)
    return []


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
