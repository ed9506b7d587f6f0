"""Changes of a value that leave what it shows: the views that objectives compare with it or with each other.

Images: the jigsaw and the rotation of PIRL (arXiv 1912.01991), and random resized crops (SimCLR, arXiv 2002.05709).
Time, of audio and series: parts in another order, parts hidden, a part alone. Texts: without some of their pieces.
All are functions of a value and a generator; a value is never changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Protocol

import numpy as np
import PIL.Image

TILES = 3  # of a jigsaw, a side
PARTS = 4  # of a time axis that is permuted
MASKED = 0.3  # of a time axis
CROP = (0.4, 1.0)  # of an image's area
ASPECT = 4 / 3  # of a crop, at most, times the image's
SHORTEST = 0.5  # of a clip that is a view of a longer one
DROPPED = 0.3  # of the pieces of a text


class Transform(Protocol):
    """A value and a generator -> a view of the value."""

    def __call__(self, value: np.ndarray, rng: np.random.Generator) -> np.ndarray: ...


def jigsaw(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[C, H, W]: its tiles in another order; a rest at the right and at the bottom stays."""
    height, width = (side // TILES for side in value.shape[1:])
    if not height or not width:
        return value
    view = value.copy()
    places = [(row * height, column * width) for row in range(TILES) for column in range(TILES)]
    for (top, left), (y, x) in zip(places, [places[i] for i in rng.permutation(len(places))], strict=True):
        view[:, top : top + height, left : left + width] = value[:, y : y + height, x : x + width]
    return view


def rotate(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[C, H, W], turned by 90, 180 or 270 degrees."""
    return np.ascontiguousarray(np.rot90(value, k=int(rng.integers(1, 4)), axes=(1, 2)))


def crop(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 [3, H, W]: a random part of it, at its own size again."""
    _, height, width = value.shape
    area, aspect = rng.uniform(*CROP), ASPECT ** rng.uniform(-1, 1)
    rows = min(height, max(1, round(height * (area / aspect) ** 0.5)))
    columns = min(width, max(1, round(width * (area * aspect) ** 0.5)))
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
    whole = PIL.Image.fromarray(np.ascontiguousarray(value.transpose(1, 2, 0)))
    box = (left, top, left + columns, top + rows)
    resized = whole.resize((width, height), PIL.Image.Resampling.BILINEAR, box=box)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def permute_time(value: np.ndarray, rng: np.random.Generator, patch: int = 1) -> np.ndarray:
    """[C, frames]: parts of whole patches in another order."""
    parts = np.array_split(np.arange(value.shape[1] // patch), PARTS)
    order = np.concatenate([parts[i] for i in rng.permutation(PARTS)])
    frames = (order[:, None] * patch + np.arange(patch)).ravel()
    return value[:, np.concatenate([frames, np.arange(len(frames), value.shape[1])])]


def mask_time(value: np.ndarray, rng: np.random.Generator, fill: float = 0.0) -> np.ndarray:
    """[C, frames]: a run of frames is ``fill``."""
    frames = value.shape[1]
    length = int(MASKED * frames)
    start = int(rng.integers(frames - length + 1))
    view = value.copy()
    view[:, start : start + length] = fill
    return view


def crop_time(value: np.ndarray, rng: np.random.Generator, patch: int = 1) -> np.ndarray:
    """[C, frames]: a run of whole patches."""
    patches = max(1, value.shape[1] // patch)
    length = max(1, round(patches * rng.uniform(SHORTEST, 1.0)))
    start = int(rng.integers(patches - length + 1))
    return value[:, start * patch : (start + length) * patch]


def drop_pieces(value: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 ids with their marks: some of the pieces between the marks are left out, and one stays."""
    kept = rng.random(len(value)) >= DROPPED
    kept[[0, -1]] = True
    if not kept[1:-1].any() and len(value) > 2:
        kept[1 + int(rng.integers(len(value) - 2))] = True
    return value[kept]


IMAGE: Mapping[str, Transform] = {"jigsaw": jigsaw, "rotate": rotate, "crop": crop}
TEXT: Mapping[str, Transform] = {"drop": drop_pieces}


def of_time(patch: int, fill: float) -> Mapping[str, Transform]:
    """Of values [C, frames] with ``patch`` frames a token, where ``fill`` says nothing."""
    return {
        "permute": partial(permute_time, patch=patch),
        "mask": partial(mask_time, fill=fill),
        "crop": partial(crop_time, patch=patch),
    }
