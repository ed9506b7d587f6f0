"""Parts, ranges and the rectangles they are made of, against numpy's indexing."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mmmoe_pretrain.checkpoint.state import pieces_of_part, pieces_of_range
from mmmoe_pretrain.parallel.placement import (
    Box,
    Cut,
    Placement,
    boxes,
    boxes_of_range,
    logical_shape,
    part_of,
    placements,
)


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[Tensor, list[Placement]]:
    """A tensor whose numbers are its flat indices, and the placements of all ranks that hold it."""
    shape, options = [], []
    for dim in range(draw(st.integers(1, 4))):
        parts, share = (draw(st.integers(1, 3)) for _ in range(2))
        blocks = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
        shape.append(parts * sum(blocks) * share)
        options.append([Cut(dim, index, parts, blocks) for index in range(parts)])
    kept = [dim for dim in options if draw(st.booleans())]  # the others are not cut at all
    whole = torch.arange(float(np.prod(shape))).view(shape)
    return whole, list(itertools.product(*kept))


def rows_of(length: int, cut: Cut) -> list[int]:
    """The indices along its dimension that a rank holds, one by one."""
    unit = length // (cut.parts * sum(cut.blocks))
    owner = [part for block in cut.blocks for part in range(cut.parts) for _ in range(block * unit)]
    return [i for i in range(length) if owner[i] == cut.index]


def held_by(whole: Tensor, placement: Placement) -> Tensor:
    by_dim = {cut.dim: rows_of(whole.shape[cut.dim], cut) for cut in placement}
    return torch.from_numpy(whole.numpy()[np.ix_(*(by_dim.get(d, range(n)) for d, n in enumerate(whole.shape)))])


def inside(whole: Tensor, offset: tuple[int, ...], piece: Tensor) -> Tensor:
    return whole[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))]


def test_keys_of_fewer_heads_than_queries_are_cut_alike() -> None:
    whole = torch.arange(16.0).view(16, 1)  # rows 0 to 7 are queries, 8 to 11 keys, 12 to 15 values
    cut = (Cut(0, 1, 2, blocks=(2, 1, 1)),)
    part = part_of(whole, cut)
    assert part.flatten().tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    pieces = pieces_of_part(part, cut)
    assert {offset: piece.flatten().tolist() for offset, piece in pieces.items()} == {
        (4, 0): [4, 5, 6, 7],
        (10, 0): [10, 11],
        (14, 0): [14, 15],
    }


def test_a_range_of_a_matrix_is_an_end_of_a_row_whole_rows_and_a_beginning() -> None:
    assert list(boxes_of_range((5, 5), 3, 19)) == [
        (0, Box((0, 3), (1, 2))),
        (2, Box((1, 0), (2, 5))),
        (12, Box((3, 0), (1, 4))),
    ]


def test_blocks_that_are_not_cut_are_one_box() -> None:
    assert list(boxes((6, 2), (Cut(0, 0, 1, blocks=(1, 1, 1)),))) == [(Box((0, 0), (6, 2)), Box((0, 0), (6, 2)))]


@given(cut_tensors())
@settings(max_examples=100, deadline=None)
def test_the_pieces_of_all_parts_tile_the_tensor_and_hold_its_numbers(case: tuple[Tensor, list[Placement]]) -> None:
    whole, ranks = case
    times_held = torch.zeros_like(whole)
    for placement in ranks:
        part = part_of(whole, placement)
        assert torch.equal(part, held_by(whole, placement))
        assert logical_shape(tuple(part.shape), placement) == whole.shape
        for offset, piece in pieces_of_part(part, placement).items():
            assert torch.equal(piece, inside(whole, offset, piece))
            inside(times_held, offset, piece).add_(1)
    assert bool((times_held == 1).all())


@given(cut_tensors(), st.data())
@settings(max_examples=100, deadline=None)
def test_the_pieces_of_all_ranges_tile_the_tensor_and_are_live(
    case: tuple[Tensor, list[Placement]], data: st.DataObject
) -> None:
    whole, ranks = case
    new = -1.0 - whole
    times_held = torch.zeros_like(whole)
    for placement in ranks:
        part = held_by(whole, placement).contiguous()
        count = part.numel()
        inner = data.draw(st.lists(st.integers(0, count), max_size=3))
        for start, end in itertools.pairwise([0, *sorted(inner), count]):
            memory = torch.cat([torch.full((2,), 0.5), part.flatten()[start:end]])  # as a slice of a buffer
            for offset, piece in pieces_of_range(memory[2:], start, tuple(part.shape), placement).items():
                assert torch.equal(piece, inside(whole, offset, piece))
                inside(times_held, offset, piece).add_(1)
                piece.copy_(inside(new, offset, piece))
            expected = held_by(new, placement).flatten()[start:end]
            assert torch.equal(memory, torch.cat([torch.full((2,), 0.5), expected]))
    assert bool((times_held == 1).all())


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@settings(max_examples=100, deadline=None)
def test_a_range_takes_few_boxes(shape: list[int], data: st.DataObject) -> None:
    start, end = sorted(data.draw(st.integers(0, int(np.prod(shape)))) for _ in range(2))
    assert len(list(boxes_of_range(tuple(shape), start, end))) <= 2 * len(shape) - 1


class Linear(nn.Linear):
    def placements(self) -> dict[str, Placement]:
        return {"weight": (Cut(0, 1, 2),)}


def test_modules_say_how_their_parameters_are_cut() -> None:
    model = nn.ModuleDict({"cut": Linear(2, 2), "whole": nn.Linear(2, 2, bias=False)})
    assert placements(model) == {"cut.weight": (Cut(0, 1, 2),), "cut.bias": (), "whole.weight": ()}
    assert placements(model["cut"]) == {"weight": (Cut(0, 1, 2),), "bias": ()}
