"""Which source each row of each lane reads: exact shares in every block, and a count of each source's samples.

Global position p is row ``p // L`` of lane ``p % L``. The rows of a lane come in blocks of P, in which source s has
exactly ``counts[s]`` places, in an order drawn by (seed, lane, block); its samples are counted in the order of the
rows. Shares are constant within a stage, which is a number of whole blocks: the last stage may have no end.

Legend: L lanes, S sources, P rows of a block (of a stage).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmmoe_pretrain.data.order.permute import fold

MAX_TABLE = 1 << 22  # places of all lanes in a block
MAX_BLOCK = 4096  # weights finer than this are rounded
EXACT, TOLERANCE = 1e-9, 1e-3  # of a share, relative
TABLES_KEPT = 4


@dataclass(frozen=True)
class Stage:
    """``blocks`` blocks of each lane (None: without end) with ``counts[s]`` places of source s each."""

    counts: tuple[int, ...]
    blocks: int | None = None

    @property
    def block(self) -> int:
        """Rows of a block."""
        return sum(self.counts)


class Mix:
    """The sources of ``lanes`` lanes over ``stages``. The samples of source s are counted in ``groups[s]`` groups of
    neighbouring lanes: a divisor of ``lanes``, or ``lanes`` where each lane has a count of its own."""

    def __init__(self, stages: Sequence[Stage], lanes: int, groups: Sequence[int], seed: int) -> None:
        self.lanes, self._seed = lanes, seed
        self._group_size = lanes // np.asarray(groups)
        blocks = np.asarray([stage.blocks or 0 for stage in stages], dtype=np.int64)
        self._counts = np.asarray([stage.counts for stage in stages], dtype=np.int64)
        self._length = self._counts.sum(axis=1)  # rows of a block
        ends = np.cumsum(blocks * self._length)
        self._first = ends - blocks * self._length
        self._base = np.cumsum(blocks[:, None] * self._counts, axis=0) - blocks[:, None] * self._counts
        self.rows = None if stages[-1].blocks is None else int(ends[-1])
        self._table = functools.lru_cache(maxsize=TABLES_KEPT)(self._build)

    def at(self, lane: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """At rows [n] of lanes [n], in any order: the source, and the number of the sample in the lane's group of
        that source; int64 [n]."""
        if self.rows is not None and row.size and int(row.max()) >= self.rows:
            raise ValueError(
                f"the data ends after {self.rows * self.lanes:,} samples, by the epochs of data.train; lower "
                f"train.steps, or give a source more epochs or no limit"
            )
        stage = np.searchsorted(self._first, row, side="right") - 1
        block, offset = np.divmod(row - self._first[stage], self._length[stage])
        source = self._counts.argmax(axis=1)[stage]  # where a stage has just one
        size = self._group_size[source]
        within = offset * size + lane % size
        mixed = np.flatnonzero((np.count_nonzero(self._counts, axis=1) > 1)[stage])
        for key in np.unique(np.stack([stage[mixed], block[mixed]]), axis=1).T.tolist():
            here = mixed[(stage[mixed] == key[0]) & (block[mixed] == key[1])]
            source[here], within[here] = (table[lane[here], offset[here]] for table in self._table(*key))
        before = self._base[stage, source] + block * self._counts[stage, source]
        return source, before * self._group_size[source] + within

    def _build(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each lane and row of a block, [L, P]: the source, and how many of its samples come before in the block
        in the lane's group."""
        length = int(self._length[stage])
        row = self._first[stage] + block * length + np.arange(length)
        order = np.argsort(fold(self._seed, np.arange(self.lanes)[:, None], row), axis=1, kind="stable")
        source = np.empty(order.shape, dtype=np.uint16)
        places = np.repeat(np.arange(self._counts.shape[1], dtype=np.uint16), self._counts[stage])
        np.put_along_axis(source, order, np.broadcast_to(places, order.shape), axis=1)
        within = np.zeros(order.shape, dtype=np.int32)
        for s in np.flatnonzero(self._counts[stage]).tolist():
            mine = source == s
            by_row = mine.reshape(-1, self._group_size[s], length).transpose(0, 2, 1)  # [groups, P, lanes of a group]
            count = np.cumsum(by_row.reshape(len(by_row), -1), axis=1).reshape(by_row.shape) - 1
            within[mine] = count.transpose(0, 2, 1).reshape(order.shape)[mine]
        return source, within


def longest_block(lanes: int) -> int:
    """The most rows of a block."""
    return max(1, min(MAX_BLOCK, MAX_TABLE // lanes))


def block_counts(weights: Sequence[float], longest: int = MAX_BLOCK) -> tuple[int, ...]:
    """Places of each source in a block of at most ``longest`` rows: the fewest whose shares are those of the weights,
    or else within TOLERANCE, or else nearest. Weights of 0, and those of less than half a place, get none, and do not
    count for what is nearest."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    counts = np.rint(shares * np.arange(1, longest + 1)[:, None])
    counts[counts.sum(axis=1) == 0, shares.argmax()] = 1
    on = shares >= min(0.5 / longest, shares.max())
    error = np.abs(counts[:, on] / counts.sum(axis=1, keepdims=True) / shares[on] - 1).max(axis=1)
    exact, close = np.flatnonzero(error < EXACT), np.flatnonzero(error < TOLERANCE)
    best = exact[0] if exact.size else close[0] if close.size else error.argmin()
    return tuple(counts[best].astype(int).tolist())


def apportion(shares: np.ndarray, rows: int, owed: np.ndarray) -> tuple[int, ...]:
    """Places of each source in a block of ``rows`` rows, by the method of largest remainders: its share, and what it
    is ``owed`` from blocks before, to within one place."""
    ideal = np.where(shares > 0, np.maximum(shares * rows + owed, 0), 0)
    if not ideal.any():
        ideal = shares * rows
    ideal *= rows / ideal.sum()
    counts = np.floor(ideal + EXACT).astype(int)
    largest = np.argsort(np.where(shares > 0, counts - ideal, 1), kind="stable")
    counts[largest[: rows - counts.sum()]] += 1
    return tuple(counts.tolist())
