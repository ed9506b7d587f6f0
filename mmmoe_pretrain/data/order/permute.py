"""Hashes and permutations by number, in constant memory and without state.

Permutations are Feistel networks with cycle walking (Black and Rogaway 2002): bijections of [0, size).
"""

from __future__ import annotations

import numpy as np

ROUNDS = 6
_MASK64 = (1 << 64) - 1


def permute(index: np.ndarray, size: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """The image of each ``index`` [n] under a permutation of [0, size) chosen by ``key`` (uint64); both broadcast."""
    size = np.asarray(size, dtype=np.uint64)
    x, size, half, key = np.broadcast_arrays(index.astype(np.uint64), size, half_bits(size), key)
    out = _feistel(x, half, key)
    outside = np.flatnonzero(out >= size)
    while outside.size:  # each walk stays on its own cycle, so the result is again one-to-one
        out[outside] = _feistel(out[outside], half[outside], key[outside])
        outside = outside[out[outside] >= size[outside]]
    return out.astype(np.int64)


def half_bits(size: np.ndarray) -> np.ndarray:
    """Half of the bits, rounded up, that a number below ``size`` (uint64 [n]) may have. The exponent of size - 1 is
    its bit length: exactly up to 2^53, and never less beyond, since rounding passes no power of two downwards."""
    bits = np.frexp((np.maximum(size, 2) - np.uint64(1)).astype(np.float64))[1]
    return (bits.astype(np.uint64) + np.uint64(1)) // np.uint64(2)


def fold(seed: int, *values: np.ndarray | int) -> np.ndarray:
    """A hash, uint64 [n], of the seed and ``values`` (integers >= 0), which broadcast."""
    key = mix64(np.asarray([seed & _MASK64], dtype=np.uint64))
    for value in values:
        key = mix64(key ^ np.asarray(value).astype(np.uint64))
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
