"""The position of a rank's part in the whole, logical parameter.

A model's modules say how their parameters are cut; engines say which stretch of a part they hold;
checkpoints and initial weights need nothing else. No groups and no communication.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Cut:
    """Dimension ``dim`` of a logical parameter is cut into ``parts``; this rank holds part ``index``.

    ``blocks``: stretches that lie side by side in the dimension, each cut into ``parts`` of its own, by their
    relative lengths: (1, 1) for gate and up, (4, 1, 1) for queries, keys and values of a quarter as many heads.
    """

    dim: int
    index: int
    parts: int
    blocks: tuple[int, ...] = (1,)

    def stretches(self, length: int) -> list[tuple[int, int, int]]:
        """For each block in a part of ``length``: its start in the part, its start in the whole, and its length."""
        unit, rest = divmod(length, sum(self.blocks))
        assert not rest, (length, self)
        begins = [unit * sum(self.blocks[:i]) for i in range(len(self.blocks))]
        return [
            (begin, begin * self.parts + self.index * unit * block, unit * block)
            for begin, block in zip(begins, self.blocks, strict=True)
        ]


Placement = tuple[Cut, ...]  # at most one cut a dimension; () is the whole parameter


@dataclass(frozen=True)
class Box:
    """A rectangle of a logical tensor: where it begins, and its size."""

    offset: tuple[int, ...]
    size: tuple[int, ...]


def placements(model: nn.Module) -> dict[str, Placement]:
    """By parameter name; a module that holds cut parameters has ``placements()``, by its own names."""
    found: dict[str, Placement] = {name: () for name, _ in model.named_parameters()}
    for prefix, module in model.named_modules():
        own = getattr(module, "placements", None)
        if own is not None:
            found |= {f"{prefix}.{name}" if prefix else name: placement for name, placement in own().items()}
    return found


def part_of(whole: Tensor, placement: Placement) -> Tensor:
    """This rank's part of a logical tensor; a view where there is one block."""
    for cut in placement:
        length, rest = divmod(whole.shape[cut.dim], cut.parts)
        assert not rest, (tuple(whole.shape), cut)
        stretches = [whole.narrow(cut.dim, begin, share) for _, begin, share in cut.stretches(length)]
        whole = stretches[0] if len(stretches) == 1 else torch.cat(stretches, cut.dim)
    return whole


def logical_shape(shape: tuple[int, ...], placement: Placement) -> tuple[int, ...]:
    """The shape of the whole parameter of which a rank holds ``shape``."""
    whole = list(shape)
    for cut in placement:
        whole[cut.dim] *= cut.parts
    return tuple(whole)


def boxes(shape: tuple[int, ...], placement: Placement) -> Iterator[tuple[Box, Box]]:
    """Pairs of rectangles: in this rank's part of shape ``shape``, and where it stands in the whole."""
    by_dim = {cut.dim: cut for cut in placement if cut.parts > 1}
    runs = [by_dim.get(dim, Cut(dim, 0, 1)).stretches(length) for dim, length in enumerate(shape)]
    for combination in itertools.product(*runs):
        here, whole, size = (tuple(v) for v in zip(*combination, strict=True)) if shape else ((), (), ())
        yield Box(here, size), Box(whole, size)


def boxes_of_range(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[int, Box]]:
    """The elements ``start`` to ``end`` of a contiguous tensor of ``shape``, as rectangles: where each
    begins in the range, and the rectangle. At most 2 dimensions - 1 of them."""
    done = start
    while done < end:
        index, rest = [], done
        for dim in range(len(shape)):
            below = math.prod(shape[dim + 1 :])
            index.append(rest // below)
            rest %= below
        size = _largest_from(shape, index, end - done)
        yield done - start, Box(tuple(index), size)
        done += math.prod(size)


def _largest_from(shape: tuple[int, ...], index: list[int], room: int) -> tuple[int, ...]:
    """The largest rectangle of at most ``room`` numbers that begins at ``index`` and is contiguous in memory."""
    best = (1,) * len(shape)
    for dim in reversed(range(len(shape))):
        below = math.prod(shape[dim + 1 :])
        if any(index[dim + 1 :]) or below > room:
            break
        length = min(shape[dim] - index[dim], room // below)
        best = (*(1,) * dim, length, *shape[dim + 1 :])
    return best
