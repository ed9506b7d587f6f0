"""A limit on the memory of this process while a decoder works on a file that others made.

Few bytes may hold many, sizes in headers may be wrong, and few decoders have a limit of their own.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def memory_at_most(size: int) -> Iterator[None]:
    """MemoryError where the process, all of its threads, would take more than ``size`` bytes beyond what it has."""
    before, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limits = [each for each in (_held() + size, before, hard) if each != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, hard))


def _held() -> int:
    """Bytes that the limit counts: data and stack (proc(5)). On systems without ``/proc`` they are not known, and the
    limit has no effect."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[5]) * resource.getpagesize()
    except OSError:
        return 1 << 60
