"""What one layout saved, any other loads: exactly, or with an error that names the tensor.

How placements and ranges cut a tensor into boxes is tested in tests/parallel/test_placement.py; that the layouts of
the engines resume each other's runs, in tests/layouts/test_reshard.py.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.boxes import tiles
from mmmoe_pretrain.checkpoint.state import ShardedState, ShardedTensor, view
from mmmoe_pretrain.parallel.placement import Box
from mmmoe_pretrain.parallel.runtime import process_group
from tests.checkpoint.support import assert_same, boxes_in, save
from tests.checkpoint.support import numbers as counted
from tests.distributed import run_ranks

SHAPES = {"experts": (8, 16, 3), "qkv": (24, 5), "out": (5, 8), "norm": (7,), "scale": (1,)}
Held = Mapping[str, list[Box]]  # what a rank holds, by parameter
Layout = list[Held]  # by rank


def whole(*names: str) -> dict[str, list[Box]]:
    return {name: [Box((0,) * len(SHAPES[name]), SHAPES[name])] for name in names or SHAPES}


def numbers(key: str, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))


def pieces_of(tensor: Tensor, boxes: list[Box]) -> ShardedTensor:
    return ShardedTensor(tuple(tensor.shape), {box.offset: view(tensor, box) for box in boxes})


def state_of(held: Held) -> ShardedState:
    """By hand what an engine would export; its tensors are views of larger memory."""
    return {
        key: pieces_of(numbers(key, SHAPES[name]), boxes) for name, boxes in held.items() for key in keys_of(name)
    }


def keys_of(name: str) -> list[str]:
    """The optimizer may keep any tensors: here three for one matrix, one for another, two for the rest."""
    others = {"experts": ("exp_avg", "exp_avg_sq", "more"), "qkv": ("momentum_buffer",)}
    return [f"model/{name}", *(f"optimizer/{name}/{kept}" for kept in others.get(name, ("exp_avg", "exp_avg_sq")))]


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """A tensor cut up at random; some boxes may be empty."""
    parts = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        box = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.size[dim]))
        for start, length in ((0, at), (at, box.size[dim] - at)):
            offset = tuple(o + start * (d == dim) for d, o in enumerate(box.offset))
            parts.append(Box(offset, tuple(length if d == dim else n for d, n in enumerate(box.size))))
    return parts


shapes = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)


@given(st.data(), shapes)
@settings(max_examples=60, deadline=None)
def test_any_cut_of_a_tensor_loads_what_any_other_saved(data: st.DataObject, shape: tuple[int, ...]) -> None:
    filled = [[box for box in data.draw(cuts(shape)) if math.prod(box.size)] for _ in range(2)]
    saved, loaded = filled[0], filled[1][: data.draw(st.integers(0, len(filled[1])))]  # other ranks hold the rest
    tensor = counted(shape)
    with tempfile.TemporaryDirectory() as root:
        checkpoint = save(root, 1, {"model/w": pieces_of(tensor, saved)})
        found = store.load(checkpoint, {"model/w": pieces_of(torch.zeros(shape), loaded)}, None)
    assert_same(found, {"model/w": pieces_of(tensor, loaded)})


LOST = [whole() | {"experts": [Box((0, 0, 0), (4, 16, 3))]}, {k: v for k, v in whole().items() if k != "experts"}]
SAVES: dict[str, tuple[Layout, str]] = {
    "half of the experts": (LOST, "hold 192 of the 384 numbers of model/experts"),
    "a piece twice": ([whole("norm"), {"norm": [Box((2,), (3,))]}],
                      "hold 10 of the 7 numbers, some twice, of model/norm"),
    "nobody holds it": ([{"norm": []}, whole("scale")], "hold 0 of the 7 numbers of model/norm"),
}  # fmt: skip
LOADS: dict[str, tuple[Layout, str]] = {
    "a rank asks too much": ([whole("qkv", "norm"), whole("out", "norm", "scale")], "lacks model/scale"),
    "no rank asks": ([whole("qkv"), whole("out")], "has model/norm, which this model does not have"),
}


def refusals(folder: Path) -> dict[str, str]:
    """The message of every refused save and load on this rank; the good ones between must not fail."""
    said = {}
    good = [whole("qkv", "norm"), whole("out", "norm")]
    with process_group(timeout_minutes=0.5):
        rank = dist.get_rank()
        good_state = state_of(good[rank])
        if rank:  # a stretch of no length is no other copy of what begins there
            good_state |= {key: ShardedTensor((7,), {(0,): torch.empty(0)}) for key in keys_of("norm")}

        def save_state(step: int, state: ShardedState) -> store.Checkpoint:
            return save(folder, step, state, group=dist.group.WORLD)

        path = save_state(1, good_state)

        def refused(case: str, action: Callable[[], object]) -> None:
            try:
                action()
            except ValueError as error:
                said[case] = str(error)
            # the ranks are still in step
            assert_same(store.load(path, good_state, dist.group.WORLD), good_state, case)

        for case, (layout, _) in SAVES.items():
            refused(case, lambda layout=layout: save_state(2, state_of(layout[rank])))
        for case, (layout, _) in LOADS.items():
            refused(case, lambda layout=layout: store.load(path, state_of(layout[rank]), dist.group.WORLD))
        shape = (9,) if rank else (7,)
        other = good_state | {key: ShardedTensor(shape, good_state[key].pieces) for key in keys_of("norm")}
        refused("one rank's shape", lambda: store.load(path, other, dist.group.WORLD))
        refused("shapes disagree", lambda: save_state(2, other))
        momentum = "optimizer/qkv/momentum_buffer"
        without = good_state | ({} if rank else {momentum: ShardedTensor((24, 5), {})})
        refused("momentum lost", lambda: save_state(2, without))
        adam = {key: tensor for key, tensor in good_state.items() if key != momentum}
        refused("another optimizer", lambda: store.load(path, adam, dist.group.WORLD))
    return said


def test_what_is_not_whole_or_of_another_model_is_refused_by_name_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(2, refusals, tmp_path)
    assert first == second
    expected = {case: message for case, (_, message) in (SAVES | LOADS).items()} | {
        "one rank's shape": "has model/norm as [7], and this model [9]",
        "shapes disagree": "disagree on the shape or type of model/norm: (7,), (9,)",
        "momentum lost": "hold 0 of the 120 numbers of optimizer/qkv/momentum_buffer",
        "another optimizer": "has the optimizer state ['exp_avg', 'exp_avg_sq', 'momentum_buffer'], and the "
        "optimizer of this run keeps ['exp_avg', 'exp_avg_sq']; set optimizer.kind",
    }
    assert first.keys() == expected.keys()
    for case, message in expected.items():
        assert message in first[case], case
    found = store.find_latest(tmp_path)
    assert found is not None and found.name == "step_00000001"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]


def save_copies(folder: Path) -> None:
    with process_group(timeout_minutes=0.5):
        half = {"experts": [Box((4 * dist.get_rank(), 0, 0), (4, 16, 3))]}
        save(folder, 1, state_of(whole() | half), group=dist.group.WORLD)


def test_copies_are_written_once_and_spread_over_the_writers(tmp_path: Path) -> None:
    run_ranks(2, save_copies, tmp_path)
    held: Counter[int] = Counter()  # numbers by file; each rank writes one
    for file, _, _, size in itertools.chain.from_iterable(boxes_in(tmp_path / "step_00000001").values()):
        held[file] += math.prod(size)
    # Value and two of the optimizer's tensors of all, one more of experts and one less of qkv, once.
    assert held.total() == 3 * sum(math.prod(shape) for shape in SHAPES.values()) + 384 - 120
    assert len(held) == 2
    # The two copies of 120 balance, the three of 40 leave 40, of which those of 7 and 1 take 24.
    assert max(held.values()) - min(held.values()) == 16


@given(st.data(), shapes, st.sampled_from(["nothing", "lose", "double", "move"]))
@settings(max_examples=300, deadline=None)
def test_boxes_tile_a_tensor_if_each_number_is_counted_once(
    data: st.DataObject, shape: tuple[int, ...], change: str
) -> None:
    parts = data.draw(cuts(shape))
    chosen = parts[data.draw(st.integers(0, len(parts) - 1))]
    if change in ("lose", "move"):
        parts.remove(chosen)
    if change == "double":
        parts.append(chosen)
    if change == "move":
        parts.append(Box((chosen.offset[0] + 1, *chosen.offset[1:]), chosen.size))
    counts = torch.zeros([n + 1 for n in shape])  # room for a box that was moved out
    for box in parts:
        counts[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))] += 1
    expected = torch.zeros_like(counts)
    expected[tuple(slice(n) for n in shape)] = 1
    offset, size = (
        np.asarray([getattr(box, of) for box in parts], dtype=np.int64).reshape(len(parts), len(shape))
        for of in ("offset", "size")
    )
    assert tiles(offset, size, shape) == torch.equal(counts, expected)
