"""The sample at each global position: a pure function of (seed, position), with locality.

A sampler without state: resuming costs the same at every position, and no layout can change the order.

Position p is row ``p // L`` of lane ``p % L``; ``mix.py`` chooses its source and numbers the source's samples in the
lane: number k has the virtual position ``v = k * L + lane`` in the source, which is place ``i = v % N`` of epoch
``v // N``. In each epoch

1. shards are cut into chunks of consecutive samples, and the chunks are permuted;
2. that sequence is cut into L contiguous ranges, one a lane, whose lengths differ by at most 1;
3. each range is cut into shuffle windows of ``window // L`` samples, which are permuted.

So every sample comes once an epoch, a lane reads few shards at a time, and at any time the L lanes together draw
from about ``window`` samples of chunks from all over the source. A source of at most ``window`` samples is permuted
as a whole.

Legend: N samples of a source, L lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmmoe_pretrain.data.order.mix import Mix, Stage
from mmmoe_pretrain.data.order.permute import fold, permute

MOST_CHUNKS = 1 << 22  # of a source, 16 bytes each and 12 more an epoch: larger sources have longer chunks
EPOCHS_KEPT = 2  # whose permutation of chunks stays in memory
AT_ONCE = 1 << 14  # chunks that are permuted at a time
NONE = -1


@dataclass(frozen=True)
class Places:
    """For each position, int64 [n]: the source; of an indexed one the epoch and the index of the sample; of a stream
    the sub-lane and the number of the sample in it. What does not apply is -1."""

    source: np.ndarray
    epoch: np.ndarray
    index: np.ndarray
    sub_lane: np.ndarray
    number: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Places:
        return Places(self.source[rows], self.epoch[rows], self.index[rows], self.sub_lane[rows], self.number[rows])


class Order:
    """The order of the training samples over ``sources`` as ``stages`` mix them.

    A source is given by the sizes of its shards in order, a stream by its number of sub-lanes, which divides
    ``lanes``. ``chunk``: the most consecutive samples of a shard that stay together.
    """

    def __init__(
        self,
        sources: Sequence[np.ndarray | int],
        stages: Sequence[Stage],
        seed: int,
        *,
        lanes: int,
        window: int,
        chunk: int,
    ) -> None:
        self.lanes, self._window = lanes, window
        groups = [source if isinstance(source, int) else lanes for source in sources]
        self._mix = Mix(stages, lanes, groups, seed)
        self.rows = self._mix.rows  # of every lane until all sources have ended; None where one is endless
        self._groups = groups
        self._sources = {
            number: SourceOrder(sizes, lanes, window, chunk, key=(seed + 1, number))
            for number, sizes in enumerate(sources)
            if not isinstance(sizes, int)
        }

    def at(self, positions: np.ndarray) -> Places:
        """The samples at global ``positions`` [n], which may be in any order and repeat."""
        row, lane = np.divmod(np.asarray(positions, dtype=np.int64), self.lanes)
        source, number = self._mix.at(lane, row)
        epoch, index, sub_lane = (np.full(len(row), NONE, dtype=np.int64) for _ in range(3))
        for s in np.unique(source).tolist():
            here = np.flatnonzero(source == s)
            if s in self._sources:
                epoch[here], index[here] = self._sources[s].at(number[here] * self.lanes + lane[here])
                number[here] = NONE
            else:
                sub_lane[here] = lane[here] * self._groups[s] // self.lanes
        return Places(source, epoch, index, sub_lane, number)


class SourceOrder:
    """The epochs of one indexed source whose shards have ``sizes`` samples. ``key``: integers that the permutations
    depend on."""

    def __init__(self, sizes: np.ndarray, lanes: int, window: int, chunk: int, key: tuple[int, int]) -> None:
        sizes = np.asarray(sizes, dtype=np.int64)
        self.samples = int(sizes.sum())
        if self.samples < 1:
            raise ValueError("every source needs at least one sample; leave empty sources out of data.train")
        self._lanes, self._seed, self._source = lanes, key[0], key[1]
        self._whole, self._window = self.samples <= window, max(1, window // lanes)
        if not self._whole:
            self._start, self._length = chunks(sizes, max(chunk, -(-self.samples // MOST_CHUNKS)))
        self._chunks_of = functools.lru_cache(maxsize=EPOCHS_KEPT)(self._permuted_chunks)

    def at(self, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs [n] and indices [n] at the virtual positions ``v`` [n]."""
        epoch, i = np.divmod(v, self.samples)
        if self._whole:
            return epoch, permute(i, self.samples, fold(self._seed, self._source, epoch))
        place = self._in_window(epoch, i)
        index = np.empty_like(i)
        for e in np.unique(epoch).tolist():
            here = np.flatnonzero(epoch == e)
            order, end = self._chunks_of(e)
            n = np.searchsorted(end, place[here], side="right")
            index[here] = self._start[order[n]] + place[here] - (end[n] - self._length[order[n]])
        return epoch, index

    def _in_window(self, epoch: np.ndarray, i: np.ndarray) -> np.ndarray:
        """The place in the sequence of the epoch's chunks: lane j's range, permuted within its windows."""
        share, extra = divmod(self.samples, self._lanes)
        k, j = np.divmod(i, self._lanes)
        first = j * share + np.minimum(j, extra)
        length = share + (j < extra)
        windows = -(-length // self._window)  # of lengths that differ by at most 1
        w = ((k + 1) * windows - 1) // length
        begin, end = w * length // windows, (w + 1) * length // windows
        key = fold(self._seed, self._source, epoch, j, w)
        return first + begin + permute(k - begin, end - begin, key)

    def _permuted_chunks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The chunks of an epoch in order, and where each ends in its sequence."""
        count = len(self._start)
        order, key = np.empty(count, dtype=np.uint32), fold(self._seed, self._source, epoch)
        for first in range(0, count, AT_ONCE):  # a whole source would take hundreds of MB for a moment
            some = np.arange(first, min(first + AT_ONCE, count))
            order[some] = permute(some, count, key)
        return order, np.cumsum(self._length[order])


def chunks(sizes: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the chunks that shards of ``sizes`` samples are cut into: at most ``most`` samples each,
    of lengths in a shard that differ by at most 1."""
    counts = -(-sizes // most)
    shard = np.repeat(np.arange(len(sizes)), counts)
    n = np.arange(len(shard)) - (np.cumsum(counts) - counts)[shard]
    begin, end = n * sizes[shard] // counts[shard], (n + 1) * sizes[shard] // counts[shard]
    return (np.cumsum(sizes) - sizes)[shard] + begin, end - begin
