"""Samples to ranks so that the tokens of all ranks are level: the slowest rank's step time is everyone's.

A pure function of integers, which every rank computes for itself with the same result on any processor. Each rank
keeps its number of samples, and most of its own ones: only ranks above the mean exchange samples.
"""

from __future__ import annotations

import numpy as np

MOST_ABOVE = 0.01  # of the mean: a rank below that gives no sample away
ROUNDS = 256
CANDIDATES = 64  # of a rank's samples, evenly spaced by their tokens


def level(tokens: np.ndarray, ranks: int, fixed: np.ndarray | None = None) -> np.ndarray:
    """int64 [ranks, B]: for each rank the numbers of its samples of [0, ranks * B), ascending.

    ``tokens``: of each sample, integers [ranks * B]; rank r begins with its B neighbours from r * B on. ``fixed``:
    samples that stay there. In each round the longest rank is paired with the shortest, the second longest with the
    second shortest, and so on, and each pair exchanges the two samples that bring it nearest to equal. Where the
    longest rank has nothing to exchange with its partner, the next round shifts the partners by one.
    """
    members = np.arange(len(tokens)).reshape(ranks, -1)
    tokens = np.asarray(tokens, dtype=np.int64)
    half, total = ranks // 2, int(tokens.sum())
    limit = (1 + MOST_ABOVE) * total / ranks
    shift = 0
    for _ in range(ROUNDS if half else 0):
        load = tokens[members].sum(axis=1)
        order = np.argsort(-load, kind="stable")
        longest = order[:half][load[order[:half]] > limit]
        shortest = np.roll(order[: ranks - half - 1 : -1], -shift)[: len(longest)]
        if not len(longest):
            break
        shift = 0 if _exchange(members, tokens, longest, shortest, load, fixed) else shift + 1
        if shift == half:
            break
    return np.sort(members, axis=1)


def _exchange(
    members: np.ndarray,
    tokens: np.ndarray,
    longest: np.ndarray,
    shortest: np.ndarray,
    load: np.ndarray,
    fixed: np.ndarray | None,
) -> bool:
    """Let each rank of ``longest`` exchange a sample with its partner in ``shortest``; whether the first could."""
    give, take = (_candidates(members[side], tokens) for side in (longest, shortest))
    of_give, of_take = members[longest[:, None], give], members[shortest[:, None], take]
    gap = load[longest] - load[shortest]
    moved = tokens[of_give][:, :, None] - tokens[of_take][:, None, :]
    left = np.abs(gap[:, None, None] - 2 * moved)
    if fixed is not None:
        left[fixed[of_give][:, :, None] | fixed[of_take][:, None, :]] = np.iinfo(np.int64).max
    best = left.reshape(len(gap), -1).argmin(axis=1)
    pair = np.arange(len(gap))
    i, j = np.divmod(best, take.shape[1])
    better = left[pair, i, j] < gap
    first = bool(better[0])
    pair, i, j = pair[better], i[better], j[better]
    members[longest[pair], give[pair, i]] = of_take[pair, j]
    members[shortest[pair], take[pair, j]] = of_give[pair, i]
    return first


def _candidates(members: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Columns of ``members`` [n, B] to choose from: all, or CANDIDATES of them."""
    columns = np.argsort(tokens[members], axis=1, kind="stable")
    if columns.shape[1] <= CANDIDATES:
        return columns
    return columns[:, np.arange(CANDIDATES) * (columns.shape[1] - 1) // (CANDIDATES - 1)]
