"""Which samples each data-parallel rank reads of which microbatch: the order, cut into global microbatches, and these
over the ranks.

Microbatch a of batch b, over R ranks with B samples each, holds the global positions
``[(b * A + a) * R * B, + R * B)`` at any number of ranks. Rank r takes B neighbours of them, then ranks exchange
samples until their expected tokens are level (``level.py``); samples of streams stay, since a stream is read by as
few ranks as possible.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.order.blend import Blend
from mmmoe_pretrain.data.order.drawn import DrawnRows
from mmmoe_pretrain.data.order.lengths import Estimate, Lengths, digest, estimate, lengths_path, open_lengths
from mmmoe_pretrain.data.order.level import level
from mmmoe_pretrain.data.order.positions import Places
from mmmoe_pretrain.data.pack import PackSettings
from mmmoe_pretrain.modalities import Modalities

Estimates = tuple[Estimate | None, ...]  # of each source; None of a stream
MOST_DRAWN = 2048  # samples of a global microbatch; each costs 40 µs
KEPT = 32  # microbatches whose samples stay known: more than are read ahead


@dataclass(frozen=True)
class Share:
    """What one rank reads of a microbatch: global positions [B], ascending, and their places."""

    positions: np.ndarray
    places: Places


class Assignment:
    """The samples of each microbatch and data-parallel rank. ``estimates``: rank 0's ``estimate_all``, where
    ``needs_estimates``; by default this rank's own."""

    def __init__(
        self,
        config: RunConfig,
        sources: Sequence[Any],
        modalities: Modalities,
        dp_size: int = 1,
        estimates: Estimates | None = None,
    ) -> None:
        self._size, self._each = dp_size, microbatch_size(config, dp_size)
        if needs_estimates(config, dp_size):
            estimates = estimates or estimate_all(config, sources, modalities)
            self._lengths = _bind(config, sources, modalities, estimates)
            self._drawn = DrawnRows(config, modalities)
        self._level = config.data.level_tokens and dp_size > 1
        self.blend = Blend(config, sources, lambda source, indices: self._known(source).mean(indices))
        self._ranks = functools.lru_cache(maxsize=KEPT)(self._assign)

    @property
    def batch_size(self) -> int:
        """Samples of a microbatch on one rank."""
        return self._each

    def of_rank(self, number: int, rank: int) -> Share:
        """What ``rank`` reads of microbatch ``number``."""
        positions, places = self._ranks(number)
        mine = positions[rank]
        start = number * self._size * self._each
        return Share(mine, _at(places, mine - start))

    def expected_rows(self, positions: np.ndarray, places: Places) -> np.ndarray:
        """int64 [n]: rows in the stream of samples of indexed sources; 0 of streams. With the random choices at the
        positions of up to MOST_DRAWN samples, above on average."""
        rows = np.zeros(len(positions), dtype=np.int64)
        for source in np.unique(places.source[places.index >= 0]).tolist():
            here = np.flatnonzero((places.source == source) & (places.index >= 0))
            index, lengths = places.index[here], self._known(source)
            draw = lengths.drawn and len(positions) <= MOST_DRAWN
            rows[here] = self._drawn.of(lengths, index, positions[here]) if draw else lengths.rows(index)
        return rows

    def _assign(self, number: int) -> tuple[np.ndarray, Places]:
        """Positions [R, B] of each rank, and the places of the whole microbatch."""
        whole = np.arange(self._size * self._each) + number * self._size * self._each
        places = self.blend.at(whole)
        if not self._level:
            return whole.reshape(self._size, -1), places
        return whole[level(self.expected_rows(whole, places), self._size, fixed=places.index < 0)], places

    def _known(self, source: int) -> Lengths:
        lengths = self._lengths[source]
        assert lengths is not None, f"the lengths of source {source} are those of a stream"
        return lengths


def needs_estimates(config: RunConfig, dp_size: int) -> bool:
    """Whether the assignment depends on ``estimate_all``."""
    return config.data.weigh_by == "tokens" or (config.data.level_tokens and dp_size > 1)


def estimate_all(config: RunConfig, sources: Sequence[Any], modalities: Modalities) -> Estimates:
    """The estimates of all sources; for rank 0, whose ones all ranks use."""
    settings = PackSettings.from_config(config, modalities)
    prompt, most = config.evaluate.prompt, config.data.max_tokens_per_document
    return tuple(
        estimate(source, settings, prompt, most, open_lengths(lengths_path(source, modalities), source, modalities))
        if hasattr(source, "sizes_of")
        else None
        for source in sources
    )


def microbatch_size(config: RunConfig, dp_size: int) -> int:
    """Samples of a microbatch on one rank. Raises ValueError where the global batch does not divide."""
    total, parts = config.train.global_batch_size, config.train.num_microbatches * dp_size
    if total % parts:
        near = max(1, round(total / parts)) * parts
        raise ValueError(
            f"train.global_batch_size {total} does not divide into train.num_microbatches "
            f"{config.train.num_microbatches} x {dp_size} data-parallel ranks; use e.g. {near}"
        )
    return total // parts


def _bind(
    config: RunConfig, sources: Sequence[Any], modalities: Modalities, estimates: Estimates
) -> list[Lengths | None]:
    """Raises ValueError where this rank does not see the file of lengths that rank 0 has used."""
    found: list[Lengths | None] = []
    for source, its, known in zip(sources, config.data.train, estimates, strict=True):
        exact = None
        if known is not None and known.measured:
            path = lengths_path(source, modalities)
            exact = open_lengths(path, source, modalities)
            if exact is None or digest(exact) != known.measured:
                raise ValueError(
                    f"rank 0 has lengths of the samples of {its.path} that this rank does not find at {path}; put "
                    f"them where all machines read them, remove them, or set data.level_tokens: false"
                )
        found.append(None if known is None else Lengths(source, known, exact))
    return found


def _at(places: Places, rows: np.ndarray) -> Places:
    return Places(
        places.source[rows], places.epoch[rows], places.index[rows], places.sub_lane[rows], places.number[rows]
    )
