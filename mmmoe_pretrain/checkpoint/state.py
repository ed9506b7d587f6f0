"""The state that a checkpoint holds, by key, and the parts of it that one rank holds.

``model/NAME`` is the fp32 master weight of a parameter, or a buffer; ``optimizer/NAME/TENSOR`` is what the optimizer
keeps for a parameter, by torch's names (``exp_avg``, ``momentum_buffer``). Each is a logical tensor of full shape.
Engines hand out views of live memory and take loaded numbers back; the store writes and reads them. Neither knows the
other's layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmmoe_pretrain.parallel.placement import Box, Placement, boxes, boxes_of_range

Shape = tuple[int, ...]
Pieces = dict[Shape, Tensor]  # by offset in the logical tensor


@dataclass(frozen=True, eq=False)
class ShardedTensor:
    """The rectangles of a logical tensor of ``shape`` that a rank holds, perhaps none. Several ranks may hold the
    same. ``steady``: nothing but the update of a step changes them; others may change in its forward and backward
    pass, so that a save copies them before it returns."""

    shape: Shape
    pieces: Pieces
    steady: bool = True

    def __post_init__(self) -> None:
        held = {at: piece for at, piece in self.pieces.items() if piece.numel() or piece.shape == self.shape}
        object.__setattr__(self, "pieces", held)  # an empty piece is nowhere

    @classmethod
    def whole(cls, tensor: Tensor, steady: bool = True) -> ShardedTensor:
        """A tensor that this process holds in full."""
        return cls(tuple(tensor.shape), {(0,) * tensor.dim(): tensor}, steady)

    def boxes(self) -> list[tuple[Box, torch.dtype]]:
        return [(Box(at, tuple(piece.shape)), piece.dtype) for at, piece in self.pieces.items()]

    def clone(self) -> ShardedTensor:
        """A copy with its own tensors."""
        return self._with(lambda piece: piece.detach().clone())

    def empty_like(self) -> ShardedTensor:
        """Uninitialized pieces of the same shapes in host memory: a GPU that training fills has no room for a second
        copy."""
        return self._with(lambda piece: torch.empty(piece.shape, dtype=piece.dtype))

    @torch.no_grad()
    def copy_(self, other: ShardedTensor) -> None:
        """Take over the numbers of ``other``, which has the same pieces."""
        assert self.pieces.keys() == other.pieces.keys(), (self.pieces.keys(), other.pieces.keys())
        for at, piece in self.pieces.items():
            piece.copy_(other.pieces[at])

    def _with(self, make: Callable[[Tensor], Tensor]) -> ShardedTensor:
        return ShardedTensor(self.shape, {at: make(piece) for at, piece in self.pieces.items()}, self.steady)


ShardedState = dict[str, ShardedTensor]  # by key
WholeState = dict[str, Tensor]  # the same in one process


def model_key(name: str) -> str:
    return f"model/{name}"


def optimizer_key(name: str, tensor: str) -> str:
    return f"optimizer/{name}/{tensor}"


def split_key(key: str) -> tuple[str, str | None]:
    """The name of the parameter, and that of the optimizer's tensor where the key is one's."""
    section, _, rest = key.partition("/")
    if section == "model":
        return rest, None
    name, _, tensor = rest.rpartition("/")
    return name, tensor


def pieces_of_part(part: Tensor, placement: Placement) -> Pieces:
    """The pieces of a whole local part of a parameter."""
    return {there.offset: view(part, here) for here, there in boxes(tuple(part.shape), placement)}


def pieces_of_range(flat: Tensor, start: int, shape: Shape, placement: Placement) -> Pieces:
    """The pieces of ``flat`` [n]: elements ``start`` to ``start + n`` of a flattened local part of ``shape``."""
    found: Pieces = {}
    for begin, held in boxes_of_range(shape, start, start + flat.numel()):
        numbers = flat.narrow(0, begin, math.prod(held.size)).view(held.size)
        for here, there in boxes(shape, placement):
            common = intersection(held, here)
            if common is not None:
                offset = tuple(t + c - h for t, c, h in zip(there.offset, common.offset, here.offset, strict=True))
                found[offset] = view(numbers, within(common, held))
    return found


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are trained state (router biases), by name; the others are recomputed."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes share; None where that is nothing."""
    begin = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    ends = (min(x + m, y + n) for x, m, y, n in zip(a.offset, a.size, b.offset, b.size, strict=True))
    size = tuple(end - start for end, start in zip(ends, begin, strict=True))
    return Box(begin, size) if all(length > 0 for length in size) else None


def within(box: Box, outer: Box) -> Box:
    """``box`` as seen from where ``outer`` begins."""
    return Box(tuple(b - o for b, o in zip(box.offset, outer.offset, strict=True)), box.size)


def view(tensor: Tensor, box: Box) -> Tensor:
    for dim, (start, length) in enumerate(zip(box.offset, box.size, strict=True)):
        tensor = tensor.narrow(dim, start, length)
    return tensor
