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


@dataclass(frozen=True)
class Draws:
    """Of each position: the source, and the number of the sample in it; int64 [n].

    ``ordinal``: sample ``ordinal`` of the lane from this source. ``in_group``: of the lane's group of the source.
    """

    source: np.ndarray
    ordinal: np.ndarray
    in_group: np.ndarray


class Mix:
    """The sources of ``lanes`` lanes over ``stages``. ``groups[s]``: into how many groups of neighbouring lanes the
    lanes are cut for source s, for ``Draws.in_group``; it divides ``lanes``."""

    def __init__(self, stages: Sequence[Stage], lanes: int, groups: Sequence[int], seed: int) -> None:
        self.lanes, self._seed = lanes, seed
        self._stages, self._group_size = list(stages), [lanes // count for count in groups]
        blocks = np.asarray([stage.blocks or 0 for stage in stages], dtype=np.int64)
        self._counts = np.asarray([stage.counts for stage in stages], dtype=np.int64)
        self._blocks = self._counts.sum(axis=1)  # rows of one
        self._first = np.cumsum(blocks * self._blocks) - blocks * self._blocks
        self._base = np.cumsum(blocks[:, None] * self._counts, axis=0) - blocks[:, None] * self._counts
        last = stages[-1]
        self.rows = None if last.blocks is None else int(self._first[-1]) + last.blocks * last.block
        self._table = functools.lru_cache(maxsize=TABLES_KEPT)(self._build)

    def at(self, lane: np.ndarray, row: np.ndarray) -> Draws:
        """The draws of rows [n] of lanes [n], in any order."""
        if self.rows is not None and row.size and int(row.max()) >= self.rows:
            raise ValueError(
                f"the data ends after {self.rows * self.lanes:,} samples, by the epochs of data.train; lower "
                f"train.steps, or give a source more epochs or no limit"
            )
        stage = np.searchsorted(self._first, row, side="right") - 1
        block, offset = np.divmod(row - self._first[stage], self._blocks[stage])
        source, within, in_group = (np.zeros(len(row), dtype=np.int64) for _ in range(3))
        alone = np.count_nonzero(self._counts, axis=1) == 1
        one = alone[stage]
        source[one], within[one] = self._counts[stage[one]].argmax(axis=1), offset[one]
        size = np.asarray(self._group_size)[source]
        in_group[one] = (within * size + lane % size)[one]
        for key in np.unique(np.stack([stage[~one], block[~one]]), axis=1).T.tolist():
            here = np.flatnonzero((stage == key[0]) & (block == key[1]))
            table = self._table(*key)
            source[here], within[here], in_group[here] = (its[lane[here], offset[here]] for its in table)
        before = self._base[stage, source] + block * self._counts[stage, source]
        size = np.asarray(self._group_size)[source]
        return Draws(source, before + within, before * size + in_group)

    def _build(self, stage: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each lane and row of a block, [L, P]: the source, and how many of its samples come before in the lane
        and in the group."""
        rows, first = int(self._blocks[stage]), int(self._first[stage])
        lane = np.repeat(np.arange(self.lanes), rows)
        row = np.tile(first + block * rows + np.arange(rows), self.lanes)
        order = np.argsort(fold(self._seed, lane, row).reshape(self.lanes, rows), axis=1, kind="stable")
        source = np.empty((self.lanes, rows), dtype=np.uint16)
        places = np.repeat(np.arange(self._counts.shape[1], dtype=np.uint16), self._counts[stage])
        np.put_along_axis(source, order, np.broadcast_to(places, order.shape), axis=1)
        within, in_group = (np.zeros((self.lanes, rows), dtype=np.int32) for _ in range(2))
        for s in np.flatnonzero(self._counts[stage]).tolist():
            mine = source == s
            within[mine] = (np.cumsum(mine, axis=1) - 1)[mine]
            size = self._group_size[s]
            by_row = mine.reshape(-1, size, rows).transpose(0, 2, 1)  # [groups, P, lanes of a group]
            count = np.cumsum(by_row.reshape(len(by_row), -1), axis=1).reshape(by_row.shape) - 1
            in_group[mine] = count.transpose(0, 2, 1).reshape(self.lanes, rows)[mine]
        return source, within, in_group


def longest_block(lanes: int) -> int:
    """The most rows of a block."""
    return max(1, min(MAX_BLOCK, MAX_TABLE // lanes))


def block_counts(weights: Sequence[float], longest: int = MAX_BLOCK) -> tuple[int, ...]:
    """Places of each source in a block of at most ``longest`` rows: the fewest whose shares are those of the weights,
    or else within TOLERANCE, or else nearest. Weights of 0, and those of less than half a place, get none."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights)
    counts = np.rint(shares * np.arange(1, longest + 1)[:, None])
    counts[counts.sum(axis=1) == 0, shares.argmax()] = 1
    on = shares > 0
    error = np.abs(counts[:, on] / counts.sum(axis=1, keepdims=True) / shares[on] - 1).max(axis=1)
    exact, close = np.flatnonzero(error < EXACT), np.flatnonzero(error < TOLERANCE)
    best = exact[0] if exact.size else close[0] if close.size else error.argmin()
    return tuple(counts[best].astype(int).tolist())
