"""The order of the data: complete, with locality, and a function of (seed, position) alone."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmoe_pretrain.data.order.blend import most_dividing
from mmmoe_pretrain.data.order.mix import Stage
from mmmoe_pretrain.data.order.permute import fold, half_bits
from mmmoe_pretrain.data.order.positions import NONE, Order, SourceOrder, chunks

ALONE = [Stage((1,))]


def order_of(sizes: list[int], lanes: int, window: int, chunk: int = 8, seed: int = 0) -> Order:
    return Order([np.asarray(sizes)], ALONE, seed, lanes=lanes, window=window, chunk=chunk)


def test_the_bits_of_an_index_are_enough_and_exact_at_every_size() -> None:
    """In floating point log2(2^50 + 1) is 50, and the last index has 51 bits."""
    sizes = [1, *(2**k + around for k in range(1, 53) for around in (-1, 0, 1))]
    wanted = [(max(1, (size - 1).bit_length()) + 1) // 2 for size in sizes]
    assert half_bits(np.asarray(sizes, dtype=np.uint64)).tolist() == wanted


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    lanes=st.sampled_from([1, 2, 3, 8, 64, 1024]),
    window=st.integers(1, 200),
    chunk=st.integers(1, 70),
    seed=st.integers(-5, 2**40),
)
@settings(max_examples=80, deadline=None)
def test_every_epoch_has_each_sample_once(sizes: list[int], lanes: int, window: int, chunk: int, seed: int) -> None:
    n = sum(sizes)
    order = order_of(sizes, lanes, window, chunk, seed)
    places = order.at(np.arange(3 * n))
    assert (places.epoch == np.repeat([0, 1, 2], n)).all()  # sharp by position
    for epoch in range(3):
        assert sorted(places.index[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


@given(seed=st.integers(0, 99), positions=st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_a_draw_depends_on_its_position_alone(seed: int, positions: list[int]) -> None:
    def fresh() -> Order:
        sizes = [np.full(10, 100), 4, np.asarray([7, 70])]
        return Order(sizes, [Stage((3, 2, 1))], seed, lanes=8, window=80, chunk=16)

    together = fresh().at(np.array(positions))
    for i, position in enumerate(positions):
        alone = fresh().at(np.array([position]))
        for name in ("source", "epoch", "index", "sub_lane", "number"):
            assert getattr(alone, name)[0] == getattr(together, name)[i]


def test_a_small_source_is_permuted_as_a_whole_in_every_epoch() -> None:
    size = 500
    first = order_of([size], lanes=16, window=size).at(np.arange(2 * size)).index
    other = order_of([size], lanes=16, window=size, seed=1).at(np.arange(size)).index
    for a, b in ((first[:size], first[size:]), (first[:size], other), (first[:size], np.arange(size))):
        # equal places of two random permutations: 1 in the mean, Poisson
        assert (a == b).sum() < 8
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.2  # standard deviation 1 / sqrt(500) = 0.045


@pytest.mark.parametrize("ranks", [2, 8])
def test_a_rank_reads_few_chunks_at_a_time(ranks: int) -> None:
    """Lanes are the samples of a batch: a rank has its own ones, each of which reads two chunks at a time."""
    batch, chunk, window_of_lane = 32, 16, 32
    order = order_of([100] * 200, lanes=batch, window=batch * window_of_lane, chunk=chunk)
    positions = np.arange(batch * window_of_lane).reshape(window_of_lane, ranks, -1)
    read = [order.at(positions[:, rank].ravel()).index // chunk for rank in range(ranks)]
    lanes_of_rank = batch // ranks
    for chunks_read in read:
        # a shard's chunks have 14 or 15 samples, and a window may begin in the middle of one: at most 4 chunks of 14
        # in 32 samples, and each of those may lie across two of 16
        assert len(np.unique(chunks_read)) <= lanes_of_rank * 4 * 2
    whole = np.unique(order_of([100] * 200, batch, 20_000, chunk).at(positions[:, 0].ravel()).index // chunk)
    assert len(whole) > 1.5 * len(np.unique(read[0]))
    assert len(np.unique(np.concatenate(read))) > 200 // 2  # yet the batches come from all over the source


def test_chunks_tile_the_shards_evenly() -> None:
    start, length = chunks(np.asarray([10, 3, 4]), most=4)
    assert start.tolist() == [0, 3, 6, 10, 13]
    assert length.tolist() == [3, 3, 4, 3, 4]


@pytest.mark.parametrize("lanes, shards, expected", [(64, 1000, 64), (64, 63, 32), (96, 50, 48), (7, 5, 1)])
def test_a_stream_has_lanes_that_divide_those_of_the_run(lanes: int, shards: int, expected: int) -> None:
    assert most_dividing(lanes, shards) == expected


def test_a_stream_in_a_blend_is_read_on_in_every_sub_lane() -> None:
    """Numbers of a sub-lane rise with the position and leave none out, whatever the blend."""
    order = Order([np.asarray([50]), 4], [Stage((2, 3))], 0, lanes=16, window=8, chunk=4)
    places = order.at(np.arange(16 * 50))
    streamed = places.source == 1
    assert streamed.sum() == 16 * 30
    assert (places.index[streamed] == NONE).all()
    assert (places.number[~streamed] == NONE).all()
    for lane in range(4):
        here = places.sub_lane == lane
        assert set((np.flatnonzero(here) % 16).tolist()) == set(range(4 * lane, 4 * lane + 4))
        assert places.number[here].tolist() == list(range(4 * 30))


def test_positions_are_cheap_far_from_the_start() -> None:
    order = SourceOrder(np.full(10_000, 10_000), lanes=64, window=1 << 16, chunk=256, key=(1, 0))
    epoch, index = order.at(np.arange(5 * 10**9, 5 * 10**9 + 64))
    assert (epoch == 50).all()
    assert len(np.unique(index // 10_000)) > 40  # of 64 lanes


def test_an_epoch_of_many_chunks_takes_little_memory_beyond_its_order() -> None:
    source = SourceOrder(np.full(1 << 18, 2), lanes=64, window=1 << 16, chunk=1, key=(1, 0))
    tracemalloc.start()
    source.at(np.arange(64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * (1 << 19)  # of each chunk 12 bytes are kept: 4 of the order and 8 of the ends


def test_hashes_of_neighbours_are_unrelated() -> None:
    bits = np.unpackbits(fold(0, np.arange(4096)).view(np.uint8)).reshape(4096, 64)
    np.testing.assert_allclose(bits.mean(axis=0), 0.5, atol=0.05)  # six standard deviations


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        order_of([0], 1, 1)
