"""Boxes as arrays: of a tensor in many boxes a rank reads the rows near what it holds, whatever cut it."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmoe_pretrain.checkpoint import boxes, store
from mmmoe_pretrain.checkpoint.state import ShardedTensor
from mmmoe_pretrain.checkpoint.storage import LocalStorage
from mmmoe_pretrain.parallel.placement import Box
from tests.checkpoint.support import numbers, rewrite, save


def grid(shape: tuple[int, ...], cuts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Equal boxes, in the order of their starts."""
    size = np.asarray([n // c for n, c in zip(shape, cuts, strict=True)])
    offset = np.stack(np.meshgrid(*map(np.arange, cuts), indexing="ij"), axis=-1).reshape(-1, len(shape)) * size
    order = np.argsort([np.ravel_multi_index(tuple(o), shape) for o in offset])
    return offset[order], np.broadcast_to(size, offset.shape)


@given(
    st.data(),
    st.sampled_from([((8, 96, 4), (8, 24, 2)), ((200,), (100,)), ((6, 50, 3), (1, 50, 3)), ((40, 40), (20, 10))]),
)
@settings(max_examples=150, deadline=None)
def test_no_box_that_is_wanted_is_outside_of_the_rows_that_are_read(
    data: st.DataObject, case: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    shape, cuts = case
    offset, size = grid(shape, cuts)
    begin = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    wanted = Box(begin, tuple(data.draw(st.integers(1, n - b)) for n, b in zip(shape, begin, strict=True)))
    near = boxes.rows_near(boxes.blocks_of(offset, size, shape), len(offset), [wanted], shape)
    shared = {
        i
        for i, (o, s) in enumerate(zip(offset.tolist(), size.tolist(), strict=True))
        if all(a < b + m and b < a + n for a, n, b, m in zip(o, s, wanted.offset, wanted.size, strict=True))
    }
    assert shared <= set(near)
    which, start, length = boxes.overlaps(offset, size, wanted)
    assert set(which.tolist()) == shared
    assert int(length.prod(axis=1).sum()) == math.prod(wanted.size)
    assert (start >= np.asarray(wanted.offset)).all()


def test_a_box_near_the_first_number_needs_the_first_block_alone() -> None:
    offset, size = grid((64_000,), (1000,))
    blocks = boxes.blocks_of(offset, size, (64_000,))
    assert blocks[:2] == ((0, 4096), (4096, 8192)) and len(blocks) == 16  # of 64 boxes of 64 numbers
    assert boxes.rows_near(blocks, 1000, [Box((100,), (64,))], (64_000,)) == range(64)
    assert boxes.rows_near(blocks, 1000, [Box((63_000,), (1,))], (64_000,)) == range(960, 1000)
    assert boxes.rows_near(blocks, 1000, [Box((4095,), (2,))], (64_000,)) == range(128)


def test_tensors_are_told_apart_and_large_ones_counted_exactly() -> None:
    """The second of three lacks a number, and the third has numbers that int64 could not tell apart."""
    shapes = [(2, 2), (2, 2), (2, 2)]
    tensor = np.asarray([0, 1, 1, 2])
    offset = np.asarray([[0, 0], [0, 0], [1, 0], [0, 0]])
    size = np.asarray([[2, 2], [1, 2], [1, 1], [2, 2]])
    assert boxes.untiled(tensor, offset, size, shapes) == [1]
    large = (1 << 20, 1 << 20, 1 << 19)  # 2^59 numbers, and more than 2^62 places of corners with its neighbour's
    whole = np.asarray([[0, 0, 0]] * 9)
    assert boxes.untiled(np.arange(9), whole, np.asarray([large] * 9), [large] * 9) == []
    short = np.asarray([large] * 8 + [(1 << 20, 1 << 20, (1 << 19) - 1)])
    assert boxes.untiled(np.arange(9), whole, short, [large] * 9) == [8]


@pytest.fixture
def cut_up(tmp_path: Path) -> store.Checkpoint:
    """A tensor in 1,000 boxes, and a small one."""
    many = ShardedTensor((1000, 16), {(i, 0): row[None] for i, row in enumerate(numbers((1000, 16)))})
    return save(tmp_path, 1, {"model/w": many, "model/b": ShardedTensor.whole(numbers((3,)))})


def test_a_rank_reads_the_rows_of_what_it_holds(cut_up: store.Checkpoint) -> None:
    read = []
    original = LocalStorage.reader

    @contextmanager
    def counting(self: LocalStorage, path: str):
        with original(self, path) as read_into:
            yield lambda at, buffer: (read.append((path, len(buffer))), read_into(at, buffer))

    mine = {"model/w": ShardedTensor((1000, 16), {(130, 0): torch.zeros(3, 16)}),
            "model/b": ShardedTensor((3,), {})}  # fmt: skip
    with mock.patch.object(LocalStorage, "reader", counting):
        found = store.load(cut_up, mine, None)
    assert torch.equal(found["model/w"].pieces[130, 0], numbers((1000, 16))[130:133])
    of_boxes = [size for path, size in read if path.endswith("boxes.bin")]
    assert of_boxes == [64 * 8 * 6]  # one block of 64 rows, of the file's number, the byte, offset and size


def test_blocks_that_lie_are_found_by_what_is_missing(cut_up: store.Checkpoint) -> None:
    path = Path(str(cut_up)) / "index.json"
    rewrite(path, path.read_bytes().replace(b"[2048,3072]", b"[2048,2049]"))  # rows 128 to 191: 16 numbers each
    mine = {"model/w": ShardedTensor((1000, 16), {(130, 0): torch.zeros(3, 16)}), "model/b": ShardedTensor((3,), {})}
    with pytest.raises(ValueError, match=r"is damaged: it holds 0 of the 48 numbers of model/w at \[130, 0\]"):
        store.load(cut_up, mine, None)
