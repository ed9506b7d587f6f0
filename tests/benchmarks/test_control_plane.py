"""The control plane of many ranks, and its benchmark: what rank 0 is sent, who writes what, and how that grows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import control_plane
from benchmarks.control import parts
from benchmarks.control.ranks import on_simulated_ranks
from benchmarks.control.state import job_of, ranges_of_buckets, ranges_of_parameters, states_of
from mmmoe_pretrain.checkpoint.files import header_of
from mmmoe_pretrain.checkpoint.save_plan import plan_save
from mmmoe_pretrain.checkpoint.state import ShardedState, ShardedTensor
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.parallel.agreement import agree, exchange, exchange_distinct, exchange_each, from_rank_0
from tests.checkpoint.support import boxes_in, numbers
from tests.support import tiny_config


def talk(rank: int, group: object) -> list[object]:
    return [
        from_rank_0(group, lambda: "x"),
        exchange(group, lambda: rank, sum),
        agree(group, lambda: rank),
        exchange_each(group, lambda: rank, lambda ranks: [100 + r for r in ranks]),
        exchange_distinct(group, lambda: rank % 2, lambda values, which: (values, which)),
    ]


def test_threads_agree_as_ranks_do() -> None:
    """As tests/parallel/test_agreement.py has it of gloo ranks."""
    cost = on_simulated_ranks(4, talk)
    assert cost.results == [["x", 6, rank, 100 + rank, ([0, 1], [0, 1, 0, 1])] for rank in range(4)]
    assert min(cost.received, cost.sent) > 0
    with pytest.raises(ValueError, match="rank 1 has failed"):
        on_simulated_ranks(3, lambda rank, group: agree(group, lambda: failing(rank)))


def failing(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 has failed")


def test_bytes_are_those_of_the_longest_message_of_every_rank() -> None:
    """A pickled bytes object of n has n and some more."""
    few = on_simulated_ranks(3, lambda rank, group: exchange(group, lambda: bytes(10_000 * (rank == 2)), lambda _: 0))
    assert 20_000 < few.received < 20_200  # two ranks send as much as the longest
    many = on_simulated_ranks(8, lambda rank, group: from_rank_0(group, lambda: bytes(10_000)))
    assert 30_000 < many.sent < 30_300 and many.received == 0  # log2(8) times
    assert on_simulated_ranks(8, talk, present=1).results[0][1] == 0  # seven ranks send what rank 0 does


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny model whose experts are spread over two ranks."""
    return tiny_config(
        tmp_path_factory.mktemp("control"),
        moe={"num_experts": 4},
        parallel={"expert_parallel_size": 2, "zero_stage": 1},
        train={"global_batch_size": 64, "num_microbatches": 1},
    )


@pytest.mark.parametrize("ranges", [ranges_of_buckets, ranges_of_parameters])
def test_the_states_of_all_ranks_make_up_the_model(config: RunConfig, ranges: parts.Ranges) -> None:
    states = states_of(job_of(config, 8), ranges)
    for key in states[0]:
        held = {(at, tuple(p.shape)) for state in states for at, p in state[key].pieces.items()}
        assert sum(math.prod(size) for _, size in held) == math.prod(states[0][key].shape), key


def test_a_rank_sends_its_boxes_without_names_and_gets_a_bit_for_each(config: RunConfig) -> None:
    """The names, which all ranks have alike, come from rank 0 itself."""
    received = {}
    for ranks in (4, 8, 16):
        states = states_of(job_of(config, ranks), ranges_of_parameters)
        cost = on_simulated_ranks(ranks, lambda rank, group, states=states: plan_save(states[rank], group))
        received[ranks] = cost.received / (ranks - 1)
        held = max(sum(len(tensor.pieces) for tensor in state.values()) for state in states)
        assert cost.sent / ranks < held / 8 + 400  # what else is sent are short answers to all
        assert sum(len(key) for key in states[0]) > received[ranks]  # so no rank sends its names
    assert received[16] < 1.2 * received[4]


@st.composite
def held_by_ranks(draw: st.DrawFn) -> list[ShardedState]:
    """Tensors cut by rows; each part is held by one or more of three ranks."""
    states: list[ShardedState] = [{}, {}, {}]
    for name, dtype in (("model/a", torch.float32), ("model/b", torch.bfloat16), ("model/c", torch.int64)):
        rows = draw(st.integers(1, 9))
        whole = numbers((rows, 2)).to(dtype)
        cuts = sorted({0, rows, *draw(st.lists(st.integers(0, rows), max_size=4))})
        pieces: list[dict[tuple[int, ...], torch.Tensor]] = [{}, {}, {}]
        for begin, end in pairwise(cuts):
            for rank in draw(st.sets(st.integers(0, 2), min_size=1)):
                pieces[rank][begin, 0] = whole[begin:end]
        for state, held in zip(states, pieces, strict=True):
            state[name] = ShardedTensor((rows, 2), held)
    return states


@given(held_by_ranks())
@settings(max_examples=30, deadline=None)
def test_every_box_is_written_once_by_a_rank_that_holds_it_where_the_index_says(
    tmp_path_factory: pytest.TempPathFactory, states: list[ShardedState]
) -> None:
    plans = on_simulated_ranks(3, lambda rank, group: plan_save(states[rank], group)).results
    written = {}  # (key, offset) -> (file, byte), by the headers of the files
    for rank, plan in enumerate(plans):
        own = {f"{key}@{at[0]},{at[1]}" for key, tensor in states[rank].items() for at in tensor.pieces}
        for entry, at in zip(plan.entries, header_of(plan.entries)[1], strict=True):
            assert entry.key in own and entry.key not in written
            written[entry.key] = (rank, at)
    folder = tmp_path_factory.mktemp("plan")
    assert plans[0].index is not None and plans[1].index is None
    for name, data in zip(("index.json", "boxes.bin"), plans[0].index, strict=True):
        (folder / name).write_bytes(data)
    listed = {f"{key}@{o[0]},{o[1]}": (file, at) for key, rows in boxes_in(folder).items() for file, at, o, _ in rows}
    assert listed == written
    assert listed.keys() == {f"{k}@{a[0]},{a[1]}" for state in states for k, t in state.items() for a in t.pieces}


@pytest.fixture
def measured(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[control_plane.Found]:
    monkeypatch.setattr(control_plane.run_config, "load", lambda *args: config)
    yield control_plane.run((4, 8), shards=40)


def test_all_parts_are_measured_at_4_and_8_ranks(
    measured: control_plane.Found, capsys: pytest.CaptureFixture[str]
) -> None:
    control_plane.print_table(measured)
    found = json.loads(json.dumps(control_plane.summary(measured), allow_nan=False))
    assert {part.partition(",")[0] for part in found} == {
        "plan", "start", "data index", "data order", "save plan", "index of a save", "load plan", "heartbeats",
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert all(f"{part:<26}{8:>6}" in printed for part in found)
    assert measured["save plan, ZeRO-3"][8].received > measured["save plan, ZeRO-3"][4].received > 0
    assert measured["load plan, ZeRO-1"][8].files > 0


def test_growth_is_the_exponent_of_the_ranks() -> None:
    square = {ranks: 1e-3 * ranks**2 for ranks in (8, 64, 256, 1024)}
    assert control_plane.exponent(square, 1e-9) == pytest.approx(2)
    assert control_plane.exponent(square | {8: 5.0}, 1e-9) == pytest.approx(2)  # the first of many does not count
    assert control_plane.exponent(dict.fromkeys(square, 1e-5), 1e-2) == 0
