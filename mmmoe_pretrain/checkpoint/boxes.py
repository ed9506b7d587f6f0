"""Boxes of logical tensors as arrays: a checkpoint of a thousand ranks has a million of them.

Legend: n boxes of a tensor with d dimensions; ``offset`` and ``size`` are int64 [n, d]. The *start* of a box is the
number of its first element in the flattened tensor, its *end* the number after its last one.

In a file a tensor's boxes are ``rows``, int64 [n, 2 + 2d] (number of the file, byte in it, offset, size), in the
order of their starts. Where there are more than BLOCK, each block of so many has its (smallest start, largest end) in
the index, so that whoever wants a part of the tensor reads few of the rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from mmmoe_pretrain.checkpoint.state import Shape
from mmmoe_pretrain.parallel.placement import Box

BLOCK = 64  # rows
WORD = 8  # bytes of a number in a row
Blocks = tuple[tuple[int, int], ...]  # start and end of each


def width(dims: int) -> int:
    """Bytes of a row."""
    return WORD * (2 + 2 * dims)


def starts(offset: np.ndarray, shape: Shape) -> np.ndarray:
    """int64 [n]."""
    return offset @ strides(np.asarray(shape, dtype=np.int64))


def ends(offset: np.ndarray, size: np.ndarray, shape: Shape) -> np.ndarray:
    """int64 [n]."""
    return starts(offset + size - 1, shape) + 1


def blocks_of(offset: np.ndarray, size: np.ndarray, shape: Shape) -> Blocks:
    """Of boxes in the order of their starts; none where they are few."""
    if len(offset) <= BLOCK:
        return ()
    first = np.arange(0, len(offset), BLOCK)
    begin = starts(offset[first], shape)
    return tuple(zip(begin.tolist(), np.maximum.reduceat(ends(offset, size, shape), first).tolist(), strict=True))


def rows_near(blocks: Blocks, count: int, wanted: Iterable[Box], shape: Shape) -> range:
    """Of ``count`` rows those among which are all that share a number with one of ``wanted``."""
    if not blocks:
        return range(count)
    offsets, sizes = (
        np.asarray(its, dtype=np.int64) for its in zip(*((b.offset, b.size) for b in wanted), strict=True)
    )
    low, high = starts(offsets, shape).min(), ends(offsets, sizes, shape).max()
    bounds = np.asarray(blocks, dtype=np.int64)
    near = np.flatnonzero((bounds[:, 0] < high) & (bounds[:, 1] > low))
    return range(BLOCK * int(near[0]), min(count, BLOCK * (int(near[-1]) + 1))) if len(near) else range(0)


def overlaps(offset: np.ndarray, size: np.ndarray, box: Box) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The boxes [m] that share numbers with ``box``, and offset and size [m, d] of what they share."""
    begin = np.maximum(offset, box.offset)
    length = np.minimum(offset + size, np.add(box.offset, box.size)) - begin
    which = np.flatnonzero((length > 0).all(axis=1))
    return which, begin[which], length[which]


def tiles(offset: np.ndarray, size: np.ndarray, shape: Shape) -> bool:
    """Whether boxes cover a tensor, each number of it once, and nothing beyond it."""
    tensor = np.zeros(len(offset), dtype=np.int64)
    return not untiled(tensor, offset, size, [shape])


def untiled(tensor: np.ndarray, offset: np.ndarray, size: np.ndarray, shapes: Sequence[Shape]) -> list[int]:
    """Numbers of the tensors of ``shapes``, all of d dimensions, which are not covered once by the boxes [n] of the
    tensors ``tensor`` [n].

    A sum of boxes is determined by their corners, counted +1 and -1 in turn (its mixed difference): the boxes add up
    to the whole if and only if all corners but the whole's cancel.
    """
    whole = np.asarray(shapes, dtype=np.int64).reshape(len(shapes), -1)
    counts = (size != 0).all(axis=1)
    outside = counts & ((offset < 0) | (size < 0) | (offset + size > whole[tensor])).any(axis=1)
    found = set(tensor[outside].tolist())
    points = [math.prod(length + 1 for length in shape) for shape in shapes]  # that can be corners
    if sum(points) >= 1 << 62:  # numbers that int64 has not
        return sorted(
            found
            | {i for i, shape in enumerate(shapes) if not _tiles_one(offset[tensor == i], size[tensor == i], shape)}
        )
    keep = counts & ~outside
    base = np.concatenate([[0], np.cumsum(np.asarray(points, dtype=np.int64))])
    tensors = np.concatenate([tensor[keep], np.arange(len(shapes))])
    begin = np.concatenate([offset[keep], np.zeros_like(whole)])
    length = np.concatenate([size[keep], whole])
    steps = strides(whole + 1)[tensors]
    weight = np.concatenate([np.ones(int(keep.sum()), dtype=np.int64), -np.ones(len(shapes), dtype=np.int64)])
    corners = list(itertools.product((0, 1), repeat=whole.shape[1]))
    places = np.concatenate(
        [base[tensors] + ((begin + length * np.asarray(c, dtype=np.int64)) * steps).sum(axis=1) for c in corners]
    )
    weights = np.concatenate([weight * (-1) ** sum(corner) for corner in corners])
    order = np.argsort(places, kind="stable")
    places = places[order]
    first = np.flatnonzero(np.diff(places, prepend=-1))
    left = places[first[np.add.reduceat(weights[order], first) != 0]]
    return sorted(found | set((np.searchsorted(base, left, side="right") - 1).tolist()))


def fill(size: np.ndarray, shape: Shape) -> str:
    """How much of a tensor boxes of these sizes cover, for messages."""
    held, whole = sum(math.prod(its) for its in size.tolist()), math.prod(shape)
    return f"{held} of the {whole} numbers" + (", some twice," if held >= whole else "")


def _tiles_one(offset: np.ndarray, size: np.ndarray, shape: Shape) -> bool:
    """As ``untiled``, of numbers of any size."""
    corners: dict[tuple[int, ...], int] = {}
    boxes = [(begin, length, 1) for begin, length in zip(offset.tolist(), size.tolist(), strict=True)]
    for begin, length, weight in (*boxes, ([0] * len(shape), list(shape), -1)):
        for corner in itertools.product((0, 1), repeat=len(shape)):
            place = tuple(b + n * side for b, n, side in zip(begin, length, corner, strict=True))
            corners[place] = corners.get(place, 0) + weight * (-1) ** sum(corner)
    return not any(corners.values())


def strides(shape: np.ndarray) -> np.ndarray:
    """Of each dimension the numbers of one step in it."""
    below = np.concatenate([shape[..., 1:], np.ones_like(shape[..., :1])], axis=-1)
    return np.cumprod(below[..., ::-1], axis=-1, dtype=np.int64)[..., ::-1]
