"""Values in shared memory: what is written is what is read, and memory is used again or given back."""

from __future__ import annotations

import gc
import os
import resource
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.data.workers.arena import ALIGNMENT, STRIDE, Arena, Slots, dump, load
from tests.support import in_forks

MB = 1 << 20


def memory(arena: Arena) -> int:
    return os.fstat(arena.descriptor).st_blocks * 512


@pytest.mark.parametrize("value", [
    None, ("a", 3), np.arange(7), np.zeros((0, 4), np.float32), [np.ones(n, np.uint8) for n in range(1500)],
    {"x": np.arange(12).reshape(3, 4).T, "flags": np.array([True, False]), "text": np.array(["ü", "b"])},
], ids=["none", "plain", "array", "empty", "more arrays than one call writes", "mixed"])  # fmt: skip
def test_a_value_is_read_as_it_was_written(value: Any) -> None:
    arena = Arena(MB)
    for slot in (arena.take(), arena.take()):
        length = Slots(arena.descriptor).write(slot, value)
        assert length == sum(map(len, dump(value)))
        found = Slots(arena.descriptor).load(slot, length)
        np.testing.assert_equal(found, value)
    arena.close()


def test_arrays_are_aligned_views_that_may_be_written() -> None:
    arena = Arena(MB)
    slot, slots = arena.take(), Slots(arena.descriptor)
    length = slots.write(slot, [np.arange(5), np.arange(6.0)])
    for array in slots.load(slot, length):
        assert array.ctypes.data % ALIGNMENT == 0
        array[0] = 9
    assert slots.load(slot, length)[1][0] == 9.0
    arena.close()


def test_slots_are_used_again_and_memory_beyond_the_limit_is_given_back() -> None:
    arena, value = Arena(5 * MB), np.ones(MB, np.uint8)
    slots_of_worker = Slots(arena.descriptor)

    def fill() -> int:
        slot = arena.take()
        arena.written(slot, slots_of_worker.write(slot, value))
        return slot

    slots = [fill() for _ in range(10)]
    assert arena.used >= 10 * MB
    lent = load(arena.lend(slots.pop()))
    for slot in slots:
        arena.give_back(slot)
    assert arena.used == 0
    assert memory(arena) < 6 * MB  # of ten
    assert sorted(fill() for _ in range(9)) == sorted(slots)
    assert all((slots_of_worker.load(slot, MB + 512)[:] == 1).all() for slot in slots)  # pages given back come again
    assert lent.sum() == MB
    del lent
    gc.collect()
    assert arena.take() == 9  # the lent one, with its last view
    arena.close()


def test_maps_of_two_arenas_leave_descriptors_free_where_a_process_may_have_few() -> None:
    def write() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        arenas = Arena(MB), Arena(MB)
        for slots, arena in [(Slots(arena.descriptor), arena) for arena in arenas]:
            for n in range(300):
                slot = arena.take()
                assert slots.load(slot, slots.write(slot, n)) == n
        assert len(os.listdir("/proc/self/fd")) < 128

    assert in_forks(write) == [0]


def test_a_value_whose_writer_has_ended_gives_its_memory_back_where_addresses_are_few() -> None:
    def recover() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (STRIDE // 2, STRIDE // 2))
        arena = Arena(MB)
        Slots(arena.descriptor).write(slot := arena.take(), np.ones(MB))
        arena.recover(slot)
        assert memory(arena) == 0
        assert arena.take() == slot

    assert in_forks(recover) == [0]
