"""What one layout saved, any other loads: exactly, or with an error that names the tensor."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.index import tiles
from mmmoe_pretrain.checkpoint.state import Pieces, ShardedState, ShardedTensor, pieces_of_part, pieces_of_range
from mmmoe_pretrain.parallel.placement import Box, Cut, Placement, part_of
from mmmoe_pretrain.parallel.runtime import process_group
from tests.checkpoint.support import assert_same, rewrite
from tests.distributed import run_ranks

SHAPES = {"experts": (8, 16, 3), "qkv": (24, 5), "out": (5, 8), "norm": (7,), "scale": (1,), "router_bias": (8,)}
BUFFERS = {"router_bias"}
KEEP = store.Retention(last=1)


@dataclass(frozen=True)
class Held:
    """What a rank holds of a parameter: a part, or the elements ``span`` of the flattened part."""

    placement: Placement = ()
    span: tuple[int, int] | None = None


Layout = list[dict[str, Held]]  # by rank


def uncut(*names: str) -> dict[str, Held]:
    return {name: Held() for name in names or SHAPES}


def expert_parallel(ranks: int) -> Layout:
    return [{**uncut(), "experts": Held((Cut(0, rank, ranks),))} for rank in range(ranks)]


def tensor_parallel(ranks: int) -> Layout:
    return [
        {
            **uncut(),
            "experts": Held((Cut(1, rank, ranks, blocks=(1, 1)),)),
            "qkv": Held((Cut(0, rank, ranks, blocks=(1, 1, 1)),)),
            "out": Held((Cut(1, rank, ranks),)),
        }
        for rank in range(ranks)
    ]


def experts_within_tensor_parallel() -> Layout:
    layout = [dict(held) for held in tensor_parallel(2) * 2]  # tensor ranks 0, 1, 0, 1
    for rank, held in enumerate(layout):
        held["experts"] = Held((Cut(0, rank // 2, 2), *held["experts"].placement))
    return layout


def zero(layout: Layout, ranks: int) -> Layout:
    """Each part flattened over ``ranks`` data-parallel ranks, the last stretch shorter or empty."""
    return [
        {name: span_of(name, held, rank, ranks) for name, held in parts.items()}
        for rank in range(ranks)
        for parts in layout
    ]


def span_of(name: str, held: Held, rank: int, ranks: int) -> Held:
    if name in BUFFERS:
        return held
    count = part_of(torch.empty(SHAPES[name]), held.placement).numel()
    share = -(-count // ranks)
    return Held(held.placement, (min(rank * share, count), min((rank + 1) * share, count)))


LAYOUTS: dict[str, Layout] = {
    "one": [uncut()],
    "ep2": expert_parallel(2),
    "ep4": expert_parallel(4),
    "tp2": tensor_parallel(2),
    "tp4": tensor_parallel(4),
    "ep2 tp2": experts_within_tensor_parallel(),
    "pp2": [uncut("experts", "norm", "scale"), uncut("qkv", "out", "router_bias")],
    "pp4": [uncut("qkv"), uncut("out", "scale"), uncut("experts", "router_bias"), uncut("norm")],
    "zero2": zero([uncut()], 2),
    "zero2 tp2": zero(tensor_parallel(2), 2),
}


def numbers(name: str, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {kind}".encode()))
    return torch.randn(SHAPES[name], generator=generator)


def zeros(name: str, kind: str) -> Tensor:
    return torch.zeros(SHAPES[name])


def state_of(held: dict[str, Held], fill: Callable[[str, str], Tensor] = numbers) -> ShardedState:
    """By hand what an engine would export; its tensors are views of larger memory."""

    def pieces(name: str, kind: str) -> Pieces:
        part = part_of(fill(name, kind), held[name].placement)
        if held[name].span is None:
            return pieces_of_part(part, held[name].placement)
        start, end = held[name].span
        return pieces_of_range(part.flatten()[start:end], start, tuple(part.shape), held[name].placement)

    return {key: ShardedTensor(SHAPES[name], pieces(name, key)) for name in held for key in keys_of(name)}


def keys_of(name: str) -> list[str]:
    """The optimizer may keep any tensors: here three for one matrix, one for another, two for the rest."""
    others = {"experts": ("exp_avg", "exp_avg_sq", "more"), "qkv": ("momentum_buffer",)}
    kept = others.get(name, ("exp_avg", "exp_avg_sq"))
    return [f"model/{name}", *(f"optimizer/{name}/{tensor}" for tensor in kept if name not in BUFFERS)]


def root_of(folder: Path, layout: str) -> Path:
    return folder / layout.replace(" ", "_")


def exchange(folder: Path, world: int, saves: bool, load_from: list[str]) -> None:
    """Save under every layout of this many ranks; load under each what ``load_from`` saved."""
    mine = {name: layout for name, layout in LAYOUTS.items() if len(layout) == world}
    with process_group(timeout_minutes=0.5):
        rank = dist.get_rank()
        for name, layout in mine.items() if saves else ():
            store.save(root_of(folder, name), 1, state_of(layout[rank]), {}, dist.group.WORLD, KEEP)
        for source in load_from:
            checkpoint = store.find_latest(root_of(folder, source))
            assert checkpoint is not None
            for name, layout in mine.items():
                expected = state_of(layout[rank])
                found = store.load(checkpoint, state_of(layout[rank], zeros), dist.group.WORLD)
                assert_same(found, expected, f"{source} -> {name}, rank {rank}")


def test_every_layout_loads_what_every_other_saved(tmp_path: Path) -> None:
    of_four, of_two, of_one = ([n for n, layout in LAYOUTS.items() if len(layout) == k] for k in (4, 2, 1))
    run_ranks(1, exchange, tmp_path, 1, True, of_one)
    run_ranks(2, exchange, tmp_path, 2, True, of_one + of_two)
    run_ranks(4, exchange, tmp_path, 4, True, of_one + of_two + of_four)
    run_ranks(2, exchange, tmp_path, 2, False, of_four)
    run_ranks(1, exchange, tmp_path, 1, False, of_two + of_four)
    for name in LAYOUTS:  # and without a process group
        checkpoint = store.find_latest(root_of(tmp_path, name))
        assert checkpoint is not None
        state = store.read_state(checkpoint)
        expected = {key: numbers(name, key) for name in SHAPES for key in keys_of(name)}
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())


LOST = [uncut(), {name: held for name, held in uncut().items() if name != "experts"}]
LOST[0]["experts"] = Held((Cut(0, 0, 2),))
TWICE = [uncut("norm"), {"norm": Held((), (2, 5))}]
NOWHERE = [{"norm": Held((), (3, 3))}, uncut("scale")]
SAVES: dict[str, tuple[Layout, str]] = {
    "half of the experts": (LOST, "hold 192 of the 384 numbers of model/experts"),
    "a piece twice": (TWICE, "hold 10 of the 7 numbers, some twice, of model/norm"),
    "nobody holds it": (NOWHERE, "hold 0 of the 7 numbers of model/norm"),
}
LOADS: dict[str, tuple[Layout, str]] = {
    "a rank asks too much": ([uncut("qkv", "norm"), uncut("out", "norm", "scale")], "lacks model/scale"),
    "no rank asks": ([uncut("qkv"), uncut("out")], "has model/norm, which this model has not"),
}


def refusals(folder: Path) -> dict[str, str]:
    """The message of every refused save and load on this rank; the good ones between must not fail."""
    said = {}
    good = [uncut("qkv", "norm"), uncut("out", "norm")]
    with process_group(timeout_minutes=0.5):
        rank = dist.get_rank()
        good_state = state_of(good[rank])
        if rank:  # a stretch of no length is no other copy of what begins there
            good_state |= {key: ShardedTensor((7,), {(0,): torch.empty(0)}) for key in keys_of("norm")}

        def save(step: int, state: ShardedState) -> store.Checkpoint:
            return store.save(folder, step, state, {}, dist.group.WORLD, KEEP)

        path = save(1, good_state)

        def refused(case: str, action: Callable[[], object]) -> None:
            try:
                action()
            except ValueError as error:
                said[case] = str(error)
            # the ranks are still in step
            assert_same(store.load(path, good_state, dist.group.WORLD), good_state, case)

        for case, (layout, _) in SAVES.items():
            refused(case, lambda layout=layout: save(2, state_of(layout[rank])))
        for case, (layout, _) in LOADS.items():
            refused(case, lambda layout=layout: store.load(path, state_of(layout[rank]), dist.group.WORLD))
        shape = (9,) if rank else (7,)
        other = good_state | {key: ShardedTensor(shape, good_state[key].pieces) for key in keys_of("norm")}
        refused("one rank's shape", lambda: store.load(path, other, dist.group.WORLD))
        refused("shapes disagree", lambda: save(2, other))
        momentum = "optimizer/qkv/momentum_buffer"
        without = good_state | ({} if rank else {momentum: ShardedTensor((24, 5), {})})
        refused("momentum lost", lambda: save(2, without))
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
        rank = dist.get_rank()
        store.save(folder, 1, state_of([uncut("qkv"), uncut("qkv")][rank]), {}, dist.group.WORLD, KEEP)
        store.save(folder, 2, state_of(expert_parallel(2)[rank]), {}, dist.group.WORLD, KEEP)


def test_copies_are_written_once_and_spread_over_the_writers(tmp_path: Path) -> None:
    run_ranks(2, save_copies, tmp_path)
    found = store.find_latest(tmp_path)
    assert found is not None
    index = json.loads(Path(str(found), "index.json").read_text())
    held: Counter[int] = Counter()  # numbers by file; each rank writes one
    for tensor in index["tensors"].values():
        for file, _, _, size in tensor["boxes"]:
            held[file] += math.prod(size)
    # Value and two of the optimizer's tensors of all but the buffer, one more of experts and one less of qkv, once.
    total = 3 * sum(math.prod(shape) for shape in SHAPES.values()) - 2 * 8 + 384 - 120
    assert held.total() == total
    assert len(held) == 2
    # Two copies of 120 and three of 40 numbers balance to 200 and 160 and smaller ones; what is left is small.
    assert max(held.values()) - min(held.values()) <= 8


def test_a_checkpoint_that_lost_a_box_is_not_loaded(tmp_path: Path) -> None:
    run_ranks(2, save_copies, tmp_path)
    found = store.find_latest(tmp_path)
    assert found is not None
    path = Path(str(found), "index.json")
    index = json.loads(path.read_text())
    del index["tensors"]["model/experts"]["boxes"][1]
    rewrite(path, json.dumps(index).encode())
    with pytest.raises(ValueError, match="damaged: it holds 192 of the 384 numbers of model/experts"):
        store.read_state(found)
    with pytest.raises(ValueError, match="damaged"):
        store.load_weights(found, {"experts": torch.empty(SHAPES["experts"])})


@st.composite
def split_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A tensor cut up at random; then perhaps one box lost, doubled or moved."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    parts = [Box((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5))):
        box = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, box.size[dim]))
        for start, length in ((0, at), (at, box.size[dim] - at)):
            offset = tuple(o + start * (d == dim) for d, o in enumerate(box.offset))
            parts.append(Box(offset, tuple(length if d == dim else n for d, n in enumerate(box.size))))
    chosen = parts[draw(st.integers(0, len(parts) - 1))]
    match draw(st.sampled_from(["nothing", "lose", "double", "move"])):
        case "lose":
            parts.remove(chosen)
        case "double":
            parts.append(chosen)
        case "move":
            parts.remove(chosen)
            parts.append(Box((chosen.offset[0] + 1, *chosen.offset[1:]), chosen.size))
    return shape, parts


@given(split_boxes())
@settings(max_examples=300, deadline=None)
def test_boxes_tile_a_tensor_if_each_number_is_counted_once(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, parts = case
    counts = torch.zeros([n + 1 for n in shape])  # room for a box that was moved out
    for box in parts:
        counts[tuple(slice(o, o + n) for o, n in zip(box.offset, box.size, strict=True))] += 1
    expected = torch.zeros_like(counts)
    expected[tuple(slice(n) for n in shape)] = 1
    assert tiles(parts, shape) == torch.equal(counts, expected)
