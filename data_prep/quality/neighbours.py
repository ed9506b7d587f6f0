"""Which samples repeat earlier ones, in arrays of tens of bytes a sample.

A sample is dropped where it equals, or is close to, one that is kept; the first is always kept. So samples that are
close to a dropped one alone stay: what is dropped has a witness, and a chain of small changes is not one duplicate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np

Tables = Callable[[np.ndarray], Iterable[np.ndarray]]  # positions [n] -> keys [n], table by table
Close = Callable[[np.ndarray, np.ndarray], np.ndarray]  # positions i, j [n] -> whether they are close [n]

NEAREST = 8  # earlier neighbours of a sample that are held in memory
_HELD, _LISTED = 1 << 21, 4096  # pairs, and arrays of them, before those beyond NEAREST are dropped
_AT_ONCE = 1 << 16  # pairs that are compared
_LOW = np.uint64(0xFFFFFFFF)
_UNDECIDED, _KEPT, _DROPPED = 0, 1, 2


def first_equal(keys: np.ndarray) -> np.ndarray:
    """int64 [n]: the first position with the same row of ``keys`` [n, c], of integers."""
    order = np.lexsort(keys.T)
    ordered = keys[order]
    begins = np.ones(len(keys), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(keys), np.int64)
    first[order] = order[_starts(begins)]
    return first


def first_close(fixed: np.ndarray, tables: Tables, close: Close, most: int) -> np.ndarray:
    """int64 [n]: the first kept position that is close to each; -1: it is kept. ``fixed`` [n] are always kept.

    Positions with the same key in one of ``tables`` are compared with ``most`` before them and the first one.
    """
    state = np.where(fixed, _KEPT, _UNDECIDED).astype(np.uint8)
    found = np.full(len(fixed), -1, np.int64)
    seen = np.ones(len(fixed), bool)  # to be looked at in the next round
    while (state == _UNDECIDED).any():
        alive = np.flatnonzero(seen & (state != _DROPPED))
        pairs = _close_pairs(alive, state == _UNDECIDED, tables, close, most)
        later = (pairs >> np.uint64(32)).astype(np.int64)
        alone = state == _UNDECIDED
        alone[later] = False
        state[alone] = _KEPT
        _decide(pairs, state, found)
        seen[:] = state == _UNDECIDED
        seen[later] = seen[(pairs & _LOW).astype(np.int64)] = True
    return found


def _decide(pairs: np.ndarray, state: np.ndarray, found: np.ndarray) -> None:
    """In the order of the positions. One whose neighbours are all dropped is kept, unless more of them are not held,
    or one is undecided: the next round decides."""
    marks = bytearray(state.tobytes())
    bounds = np.flatnonzero(np.diff(pairs >> np.uint64(32), prepend=np.uint64(_LOW))).tolist()
    for start, end in itertools.pairwise([*bounds, len(pairs)]):
        later = int(pairs[start] >> np.uint64(32))
        earlier = (pairs[start:end] & _LOW).tolist()
        witness = next((i for i in earlier if marks[i] == _KEPT), None)
        if witness is not None:
            marks[later], found[later] = _DROPPED, witness
        elif len(earlier) <= NEAREST and all(marks[i] == _DROPPED for i in earlier):
            marks[later] = _KEPT
    state[:] = np.frombuffer(marks, np.uint8)


def _close_pairs(alive: np.ndarray, open_: np.ndarray, tables: Tables, close: Close, most: int) -> np.ndarray:
    """later << 32 | earlier, uint64, sorted, of the close pairs whose later one is in ``open_``; of each at most the
    first NEAREST + 1."""
    held, waiting, count = np.empty(0, np.uint64), list[np.ndarray](), 0
    for keys in tables(alive):
        for first, second in _with_equal_keys(keys, most):
            for at in range(0, len(first), _AT_ONCE):
                i, j = alive[first[at : at + _AT_ONCE]], alive[second[at : at + _AT_ONCE]]
                i, j = i[open_[j]], j[open_[j]]
                good = close(i, j)
                waiting.append(j[good].astype(np.uint64) << np.uint64(32) | i[good].astype(np.uint64))
                count += len(waiting[-1])
                if count > _HELD or len(waiting) > _LISTED:
                    held, waiting, count = _nearest(held, waiting), [], 0
    return _nearest(held, waiting)


def _nearest(held: np.ndarray, waiting: list[np.ndarray]) -> np.ndarray:
    pairs = np.unique(np.concatenate([held, *waiting]))
    begins = np.diff(pairs >> np.uint64(32), prepend=_LOW) != 0
    rank = np.arange(len(pairs)) - _starts(begins)
    return pairs[rank <= NEAREST]


def _with_equal_keys(keys: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Positions in ``keys`` of pairs with equal keys, the earlier ones first."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    begins = np.ones(len(keys), bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    start = _starts(begins)
    right = np.flatnonzero(~begins)
    for back in range(1, most + 1):
        right = right[right - back >= start[right]]
        if not len(right):
            return
        yield order[right - back], order[right]
    right = right[right - most > start[right]]
    yield order[start[right]], order[right]


def _starts(begins: np.ndarray) -> np.ndarray:
    """Of each position the last one at or before it that begins a run."""
    starts = np.where(begins, np.arange(len(begins)), 0)
    return np.maximum.accumulate(starts, out=starts)


def hamming_tables(distance: int, bits: int = 64) -> list[np.uint64]:
    """Masks such that words of ``bits`` bits that differ in at most ``distance`` of them agree under one mask: of
    distance + 2 blocks, at least two hold no difference."""
    blocks = distance + 2
    bounds = [round(bits * n / blocks) for n in range(blocks + 1)]
    parts = [((1 << high) - 1) ^ ((1 << low) - 1) for low, high in itertools.pairwise(bounds)]
    return [np.uint64(a | b) for a, b in itertools.combinations(parts, 2)]
