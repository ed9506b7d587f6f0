"""The parts of parameters and optimizer moments that one rank holds, by place in the logical tensor.

Engines hand these out as views of live memory and take loaded ones back; the store writes and reads
them. Neither knows the other's layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmoe_pretrain.parallel.placement import Box, Placement, boxes, boxes_of_range, logical_shape


@dataclass(frozen=True)
class Piece:
    """A rectangle of a logical tensor that begins at ``offset``, and its numbers (a view)."""

    offset: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True)
class ShardedParameter:
    """What a rank holds of one logical parameter of ``shape``: pieces of the fp32 master weight and of
    Adam's moments. A buffer has no moments. A rank may hold nothing (no pieces); several may hold the same.
    """

    shape: tuple[int, ...]
    value: tuple[Piece, ...]
    exp_avg: tuple[Piece, ...] | None
    exp_avg_sq: tuple[Piece, ...] | None

    def named(self, name: str) -> dict[str, tuple[Piece, ...]]:
        """By their names in a checkpoint."""
        found = {
            f"model/{name}": self.value,
            f"optimizer/{name}/exp_avg": self.exp_avg,
            f"optimizer/{name}/exp_avg_sq": self.exp_avg_sq,
        }
        return {key: pieces for key, pieces in found.items() if pieces is not None}

    def clone(self) -> ShardedParameter:
        """The same with tensors of its own."""
        return self._with(lambda tensor: tensor.detach().clone())

    def empty_like(self) -> ShardedParameter:
        """The same pieces, their tensors new, not filled, and in host memory: a GPU that training fills has no
        room for a second copy."""
        return self._with(lambda t: torch.empty(t.shape, dtype=t.dtype))

    @torch.no_grad()
    def copy_(self, other: ShardedParameter) -> None:
        """Take over the numbers of ``other``, which has the same pieces."""
        for mine, theirs in zip(self._all(), other._all(), strict=True):
            assert mine.offset == theirs.offset, (mine.offset, theirs.offset)
            mine.tensor.copy_(theirs.tensor)

    def _with(self, make: Callable[[Tensor], Tensor]) -> ShardedParameter:
        value, first, second = (
            None if pieces is None else tuple(Piece(p.offset, make(p.tensor)) for p in pieces)
            for pieces in (self.value, self.exp_avg, self.exp_avg_sq)
        )
        assert value is not None
        return ShardedParameter(self.shape, value, first, second)

    def _all(self) -> list[Piece]:
        return [piece for pieces in (self.value, self.exp_avg, self.exp_avg_sq) for piece in pieces or ()]


ShardedState = dict[str, ShardedParameter]


def pieces_of_part(part: Tensor, placement: Placement) -> tuple[Piece, ...]:
    """Of a whole local part of a parameter, as the model holds it."""
    return tuple(Piece(there.offset, _view(part, here)) for here, there in boxes(tuple(part.shape), placement))


def pieces_of_range(flat: Tensor, start: int, shape: tuple[int, ...], placement: Placement) -> tuple[Piece, ...]:
    """Of ``flat`` [n], the elements ``start`` to ``start + n`` of a local part of ``shape``, flattened."""
    found = []
    for begin, held in boxes_of_range(shape, start, start + flat.numel()):
        numbers = flat.narrow(0, begin, math.prod(held.size)).view(held.size)
        for here, there in boxes(shape, placement):
            common = _common(held, here)
            if common is None:
                continue
            inside = Box(tuple(c - h for c, h in zip(common.offset, held.offset, strict=True)), common.size)
            offset = tuple(t + c - h for t, c, h in zip(there.offset, common.offset, here.offset, strict=True))
            found.append(Piece(offset, _view(numbers, inside)))
    return tuple(found)


def whole_shape(part: Tensor, placement: Placement) -> tuple[int, ...]:
    """Of the logical parameter of which this rank's model holds ``part``."""
    return logical_shape(tuple(part.shape), placement)


def _common(a: Box, b: Box) -> Box | None:
    begin = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    ends = (min(x + m, y + n) for x, m, y, n in zip(a.offset, a.size, b.offset, b.size, strict=True))
    size = tuple(end - start for end, start in zip(ends, begin, strict=True))
    return Box(begin, size) if all(length > 0 for length in size) else None


def _view(tensor: Tensor, box: Box) -> Tensor:
    for dim, (start, length) in enumerate(zip(box.offset, box.size, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
