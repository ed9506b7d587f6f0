"""Which samples are duplicates of which: exact ones first, then those that are close.

The first sample in the order of preference is kept: held-out ones, then those of test, of val, of no split, of train,
each in the order of the shards. Samples that are held out are never dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mmmoe_pretrain.data_prep.quality.fingerprints import PERMUTATIONS, mixed, rows_of_a_band
from mmmoe_pretrain.data_prep.quality.neighbours import Tables, first_close, first_equal, hamming_tables
from mmmoe_pretrain.data_prep.quality.samples import NOTHING, Samples, Settings
from mmmoe_pretrain.data_prep.rows.row import SPLITS

COLOUR = 8.0  # mean difference of Cb and Cr, of 255, up to which images are close
MOST_IMAGES, MOST_TEXTS = 1024, 64  # with the same key in a table that a sample is compared with
HELD_OUT = "--against"  # in the place of a split
_RANKS = np.array([3, 1, 0, 2], np.uint8)  # of train, val, test and no split


@dataclass(slots=True)
class Repeats:
    """Of each sample [n]: the one that it repeats, -1 where it is kept; whether it is only close to it; how far away:
    bits of the hash of an image, 1 - similarity of a text."""

    of: np.ndarray
    near: np.ndarray
    distance: np.ndarray


def find_repeats(samples: Samples, settings: Settings) -> Repeats:
    records, fixed = samples.records, samples.held_out()
    ranks = np.where(fixed, 0, 1 + _RANKS[records["split"]]).astype(np.uint8)
    order = np.argsort(ranks, kind="stable")
    form = records["form"][order]
    first = np.arange(len(order))
    if len(compared := np.flatnonzero(form != NOTHING)):
        first[compared] = compared[first_equal(records["digest"][order[compared]])]
    near, distance = np.zeros(len(order), bool), np.zeros(len(order), np.float32)
    for number, entry in enumerate(settings.by if settings.near else ()):
        if entry == ("audio",):
            continue
        mine = np.flatnonzero((form == number) & (first == np.arange(len(order))))
        mine = mine[records["look"][order[mine]] != 0]
        if len(mine):
            held = functools.partial(_Form, records, entry, settings)
            _add_near(held, mine, order[mine], fixed[order[mine]], first, near, distance)
    again = first[first]  # of what repeats a sample that is itself close to another one
    near |= near[first]
    distance = np.where(distance[first] > distance, distance[first], distance)
    of = np.full(len(order), -1, np.int64)
    dropped = (again != np.arange(len(order))) & ~fixed[order]
    of[order[dropped]] = order[again[dropped]]
    back = np.argsort(order)
    return Repeats(of, near[back], distance[back])


def _add_near(
    form_of: Callable[[np.ndarray], _Form], mine: np.ndarray, numbers: np.ndarray, fixed: np.ndarray,
    first: np.ndarray, near: np.ndarray, distance: np.ndarray,
) -> None:  # fmt: skip
    """Note what is close among positions ``mine``, of samples ``numbers``, in ``first``, ``near``, ``distance``."""
    alike = first_equal(form_of(numbers).look[:, None])
    ones = np.flatnonzero(alike == np.arange(len(alike)))
    form = form_of(numbers[ones])
    found = first_close(fixed[ones], form.tables, form.close, form.most)
    is_kept = found < 0
    of = np.where(is_kept, np.arange(len(ones)), found)
    far = np.zeros(len(ones), np.float32)
    far[~is_kept] = form.distance(found[~is_kept], np.flatnonzero(~is_kept))
    place = np.searchsorted(ones, alike)  # of what looks the same, in ``ones``
    witness = np.where(fixed, np.arange(len(alike)), ones[of[place]])
    is_near = witness != np.arange(len(alike))
    first[mine] = mine[witness]
    near[mine], distance[mine] = is_near, far[place]


class _Form:
    """The samples ``numbers`` [n], which are compared by the media ``entry``."""

    def __init__(self, records: np.ndarray, entry: tuple[str, ...], settings: Settings, numbers: np.ndarray) -> None:
        self.records, self.numbers, self._settings = records, numbers, settings
        self.has_image, self.has_text, self.has_audio = (name in entry for name in ("image", "text", "audio"))
        self.most = MOST_IMAGES if self.has_image else MOST_TEXTS

    @property
    def look(self) -> np.ndarray:
        return self.records["look"][self.numbers]

    @functools.cached_property
    def _phash(self) -> np.ndarray:
        return self.records["phash"][self.numbers]

    @property
    def tables(self) -> Tables:
        if self.has_image:
            masks = hamming_tables(self._settings.image_distance)
            return lambda at: (self._phash[at] & mask for mask in masks)
        rows = rows_of_a_band(self._settings.text_similarity)
        starts = range(0, PERMUTATIONS - rows + 1, rows)
        signatures = self.records["signature"]
        return lambda at: (mixed(signatures[self.numbers[at], start : start + rows]) for start in starts)

    def close(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """bool [n]: whether samples ``i`` and ``j`` [n] are close in all media."""
        good = np.ones(len(i), bool)
        if self.has_image:
            good = self._bits(i, j) <= self._settings.image_distance
            colours = self.records["colours"]
            a, b = (colours[self.numbers[side[good]]].astype(np.int16) for side in (i, j))
            good[good] = np.abs(a - b).mean(axis=1) <= COLOUR
        if self.has_audio:
            a, b = (self.records["audio"][self.numbers[side[good]]] for side in (i, j))
            good[good] = a == b
        if self.has_text:
            good[good] = self._similarity(i[good], j[good]) >= self._settings.text_similarity
        return good

    def distance(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Of the images, or of the texts where there are none; float32 [n]."""
        parts = np.array_split(np.arange(len(i)), len(i) // 65_536 + 1)
        measure = self._bits if self.has_image else lambda a, b: 1 - self._similarity(a, b)
        return np.concatenate([measure(i[part], j[part]).astype(np.float32) for part in parts])

    def _bits(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        return np.bitwise_count(self._phash[i] ^ self._phash[j])

    def _similarity(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        signatures = self.records["signature"]
        a, b = (signatures[self.numbers[side]] for side in (i, j))
        return (a == b).mean(axis=1)


@dataclass(slots=True)
class Total:
    """Duplicates of samples of one split among those of another, and the first of each kind."""

    exact: int = 0
    near: int = 0
    examples: list[int] = field(default_factory=list)


def totals(samples: Samples, repeats: Repeats) -> dict[tuple[str, str], Total]:
    """By the split of what is dropped, and of what it repeats."""
    names = [*SPLITS, "", HELD_OUT]
    split, held = samples.records["split"], samples.held_out()
    dropped = np.flatnonzero(repeats.of >= 0)
    of = repeats.of[dropped]
    kinds = np.stack([split[dropped], np.where(held[of], len(names) - 1, split[of]), repeats.near[dropped]])
    values, firsts, counts = np.unique(kinds, axis=1, return_index=True, return_counts=True)
    found: dict[tuple[str, str], Total] = {}
    for (mine, other, is_near), first, count in zip(values.T.tolist(), firsts, counts.tolist(), strict=True):
        total = found.setdefault((names[mine], names[other]), Total())
        total.examples.append(int(dropped[first]))
        if is_near:
            total.near = count
        else:
            total.exact = count
    return found
