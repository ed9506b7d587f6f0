"""The sample at each global position: a pure function of (seed, position).

Mixes the sources by weight and permutes each source in each epoch. Has no state, so resuming costs the same at every
position and no layout can change the order.

Mixing: positions come in blocks of P, where source s has exactly c_s places (sum c_s = P). A seeded
permutation of the block assigns the places, and the place's rank within its source counts that
source's draws. Permutations are Feistel networks with cycle walking (Black and Rogaway 2002):
bijections of [0, size) in constant memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd

import numpy as np

ROUNDS = 6
MAX_BLOCK = 4096  # weights finer than this are rounded
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Places:
    """For each position: the source, the epoch of that source, and the index within it; int64 [n]."""

    source: np.ndarray
    epoch: np.ndarray
    index: np.ndarray


class MixOrder:
    """The order of the training samples over sources of ``sizes`` mixed by ``weights``."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        if not sizes or min(sizes) < 1:
            raise ValueError(
                f"every source needs at least one sample, but the sizes are {list(sizes)}; "
                f"leave empty sources out of data.train"
            )
        self.seed = seed
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._counts = np.asarray(block_counts(weights), dtype=np.int64)
        self._ends = np.cumsum(self._counts)

    def at(self, positions: np.ndarray) -> Places:
        """The samples at global ``positions`` [n], which may be in any order and repeat."""
        positions = np.asarray(positions, dtype=np.int64)
        block, offset = np.divmod(positions, self._ends[-1])
        place = permute(offset, np.full_like(offset, self._ends[-1]), fold(self.seed, block))
        source = np.searchsorted(self._ends, place, side="right")
        count = self._counts[source]
        ordinal = block * count + place - (self._ends[source] - count)
        epoch, index = np.divmod(ordinal, self._sizes[source])
        key = fold(self.seed + 1, source, epoch)
        return Places(source, epoch, permute(index, self._sizes[source], key))


def block_counts(weights: Sequence[float]) -> list[int]:
    """Places of each source in a block: the smallest exact ones, rounded where P would exceed MAX_BLOCK."""
    shares = [Fraction(weight).limit_denominator(MAX_BLOCK) for weight in weights]
    total = sum(shares)
    if min(shares) <= 0:
        raise ValueError(
            f"the weights {list(weights)} differ too much: the smallest would get no sample; "
            f"raise it above {float(total) / MAX_BLOCK:.2g} or leave its source out"
        )
    exact = [share / total for share in shares]
    block = 1
    for share in exact:
        block = block * share.denominator // gcd(block, share.denominator)
    block = min(block, MAX_BLOCK)
    return [max(1, round(share * block)) for share in exact]


def permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The image of each ``index`` [n] under a permutation of [0, size) chosen by ``key``."""
    size = size.astype(np.uint64)
    bits = np.ceil(np.log2(np.maximum(size, 2))).astype(np.uint64)
    half = (bits + np.uint64(1)) // np.uint64(2)
    out = _feistel(index.astype(np.uint64), half, key)
    outside = np.flatnonzero(out >= size)
    while outside.size:  # each walk stays on its own cycle, so the result is again one-to-one
        out[outside] = _feistel(out[outside], half[outside], key[outside])
        outside = outside[out[outside] >= size[outside]]
    return out.astype(np.int64)


def fold(seed: int, *values: np.ndarray) -> np.ndarray:
    """uint64 [n]: a hash of the seed and each row of ``values`` (integers >= 0)."""
    key = mix64(np.full(values[0].shape, seed & _MASK64, dtype=np.uint64))
    for value in values:
        key = mix64(key ^ value.astype(np.uint64))
    return key


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014) on uint64 [n]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _feistel(x: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for step in range(ROUNDS):
        left, right = right, left ^ (mix64(right ^ mix64(key + np.uint64(step))) & mask)
    return (left << half) | right
