"""The distributed batch sampler: which samples each data-parallel rank reads of which microbatch.

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
from mmmoe_pretrain.data.order.lengths import DrawnRows, Estimate, Lengths, estimate
from mmmoe_pretrain.data.order.level import level
from mmmoe_pretrain.data.order.positions import Places
from mmmoe_pretrain.data.pack import PackSettings
from mmmoe_pretrain.data.sources.stream import Stream
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
            self._lengths = {
                number: Lengths(sources[number], known, config.data.train[number].path)
                for number, known in enumerate(estimates)
                if known is not None
            }
            self._drawn = DrawnRows(config, modalities)
        self._level = config.data.level_tokens and dp_size > 1
        self.blend = Blend(config, sources, lambda source, indices: self._lengths[source].mean(indices))
        self._ranks = functools.lru_cache(maxsize=KEPT)(self._assign)

    @property
    def batch_size(self) -> int:
        """Samples of a microbatch on one rank."""
        return self._each

    def of_rank(self, number: int, rank: int) -> Share:
        """What ``rank`` reads of microbatch ``number``."""
        positions, places = self._ranks(number)
        rows = positions[rank] - number * self._size * self._each
        return Share(positions[rank], places[rows])

    def expected_rows(self, positions: np.ndarray, places: Places) -> np.ndarray:
        """int64 [n]: rows in the stream of samples of indexed sources; 0 of streams. With the random choices at the
        positions of up to MOST_DRAWN samples, above on average."""
        rows = np.zeros(len(positions), dtype=np.int64)
        for source in np.unique(places.source[places.index >= 0]).tolist():
            here = np.flatnonzero(places.source == source)
            index, lengths = places.index[here], self._lengths[source]
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


def needs_estimates(config: RunConfig, dp_size: int) -> bool:
    """Whether the assignment depends on ``estimate_all``."""
    return config.data.weigh_by == "tokens" or (config.data.level_tokens and dp_size > 1)


def estimate_all(config: RunConfig, sources: Sequence[Any], modalities: Modalities) -> Estimates:
    """The estimates of all sources; for rank 0, whose ones all ranks use."""
    settings = PackSettings.from_config(config, modalities)
    prompt, most = config.evaluate.prompt, config.data.max_tokens_per_document
    return tuple(
        None if isinstance(source, Stream) else estimate(source, settings, prompt, most) for source in sources
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
