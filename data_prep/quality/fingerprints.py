"""What samples are compared by: digests of their content, a perceptual hash of images, a MinHash signature of texts.

- A digest is xxh3_128 of the bytes of an image or clip, and of a text without case, punctuation and spacing
  (``rows/splits.normalise_text``).
- The perceptual hash is that of ImageHash's ``phash``: of the 8 x 8 lowest frequencies of the image at 32 x 32 grey
  pixels, which are above their median. Since it knows no colours, the mean Cb and Cr of a 4 x 4 grid are kept, too.
- A signature has the minima of 128 hash functions over the text's runs of 5 characters (Broder 1997), 16 bits of
  each; the share of equal minima estimates the Jaccard similarity of the sets, with a standard error below 0.045.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import xxhash

SIDE, LOW = 32, 8  # pixels and frequencies of the perceptual hash
GRID = 4  # of the colours
COLOURS = 2 * GRID * GRID
FLAT = 2.0  # the standard deviation of grey levels below which the frequencies are noise
PERMUTATIONS = 128
SHINGLE = 5  # characters
_AT_ONCE = 2048  # shingles
_PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication by it is a permutation
RECALL = 0.99  # of texts that are just similar enough


class Look(NamedTuple):
    """How an image looks. ``colours``: uint8 [COLOURS]."""

    phash: int
    colours: np.ndarray


def look_of(data: bytes) -> Look | None:
    """Of an image as the loader sees it (upright, on white); None where it is flat. Raises one of IMAGE_ERRORS."""
    from PIL import Image

    from mmmoe_pretrain.modalities.image_file import ImageReader

    reader = ImageReader(data)
    image = reader.pixels(min(reader.size) / (2 * SIDE)).image
    grey = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    pixels = np.asarray(grey, np.float64)
    if pixels.std() < FLAT:
        return None
    low = _cosines() @ pixels @ _cosines().T
    bits = np.packbits(low.ravel() > np.median(low))
    small = image.resize((GRID, GRID), Image.Resampling.BOX, reducing_gap=3.0).convert("YCbCr")
    return Look(int.from_bytes(bits.tobytes()), np.asarray(small)[:, :, 1:].reshape(COLOURS))


@functools.cache
def _cosines() -> np.ndarray:
    """The LOW lowest rows of the DCT-II of SIDE values."""
    at = np.arange(SIDE)
    return np.cos(np.pi / (2 * SIDE) * np.outer(np.arange(LOW), 2 * at + 1))


def signature(text: str) -> np.ndarray:
    """uint16 [PERMUTATIONS], of a text that is not empty."""
    points = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint64)
    count = max(1, len(points) - SHINGLE + 1)
    hashes = np.zeros(count, np.uint64)
    for k in range(min(SHINGLE, len(points))):
        hashes = (hashes + points[k : k + count]) * _PRIME
        hashes ^= hashes >> np.uint64(31)
    factors, shifts = _functions()
    lowest = np.full(PERMUTATIONS, np.iinfo(np.uint64).max, np.uint64)
    for at in range(0, count, _AT_ONCE):
        of_each = hashes[at : at + _AT_ONCE] * factors[:, None] + shifts[:, None]
        np.minimum(lowest, of_each.min(axis=1), out=lowest)
    return (lowest >> np.uint64(16)).astype(np.uint16)


@functools.cache
def _functions() -> tuple[np.ndarray, np.ndarray]:
    """Of each hash function x -> (a x + b) mod 2^64, an odd ``a``, and ``b``; the same everywhere and always."""
    numbers = [xxhash.xxh3_64_intdigest(f"minhash {n}".encode()) for n in range(2 * PERMUTATIONS)]
    values = np.array(numbers, np.uint64).reshape(2, PERMUTATIONS)
    return values[0] | np.uint64(1), values[1]


def rows_of_a_band(similarity: float) -> int:
    """The longest bands by which RECALL of the pairs of this similarity agree in at least one band."""

    def recall(rows: int) -> float:
        return float(1 - (1 - similarity**rows) ** (PERMUTATIONS // rows))

    return max((rows for rows in range(1, 33) if recall(rows) >= RECALL), default=1)


def mixed(columns: np.ndarray) -> np.ndarray:
    """A hash, uint64 [n], of each row of ``columns`` [n, c] of unsigned integers."""
    total = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        total = (total + column.astype(np.uint64) + np.uint64(1)) * _PRIME
        total ^= total >> np.uint64(31)
    return total
