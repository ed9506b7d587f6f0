"""The rows of the stream that samples take whose lengths are known, with the random choices of their positions: the
objectives are asked for the segments of samples that have lengths in place of contents."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import Draws, labels_drawn
from mmmoe_pretrain.data.order.lengths import Lengths
from mmmoe_pretrain.data.pack import PackSettings, origins
from mmmoe_pretrain.modalities import Modalities, Modality
from mmmoe_pretrain.objectives import build_objectives


class _Counted:
    """A modality whose values are lengths, int64 [1]."""

    def __init__(self, modality: Modality) -> None:
        self._modality = modality

    def __getattr__(self, name: str) -> Any:
        return getattr(self._modality, name)

    def num_tokens(self, value: np.ndarray) -> int:
        return int(value[0])

    def keys(self, value: np.ndarray) -> np.ndarray:
        return np.zeros(int(value[0]), dtype=np.int64)


class DrawnRows:
    """Counts rows by the objectives of a run."""

    def __init__(self, config: RunConfig, modalities: Modalities) -> None:
        counted = {name: cast(Modality, _Counted(modality)) for name, modality in modalities.items()}
        objectives = build_objectives(config.objectives, counted, config.representations)
        self._seed, self._modalities = config.seed, modalities
        self._settings = PackSettings(modalities, objectives, self._generator)

    def _generator(self, position: int, purpose: str) -> np.random.Generator:
        return Draws(self._seed, position).generator(purpose)

    def of(self, lengths: Lengths, indices: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: the rows of the samples ``indices`` of a source at global ``positions``."""
        tokens, patterns = lengths.by_modality(indices)
        counts = np.rint(tokens).astype(np.int64)
        samples = []
        for row, pattern, position in zip(counts, patterns.tolist(), positions.tolist(), strict=True):
            fit = lengths.fit(pattern)
            if fit.label_tokens:
                row = self._with_label(row, fit.label_tokens, position)
            items = (Item(name, row[m : m + 1]) for m, name in enumerate(self._modalities) if row[m])
            samples.append(Sample(SampleMeta(""), tuple(items), document=fit.document))
        return np.bincount(origins(samples, self._settings, positions).sample_n, minlength=len(samples))

    def _with_label(self, row: np.ndarray, tokens: int, position: int) -> np.ndarray:
        """The lengths of a sample that may have its class as a text, as ``decode`` draws it."""
        names = list(self._modalities)
        held = {names[m] for m in np.flatnonzero(row)}
        for name, kept in labels_drawn(held, self._modalities, Draws(self._seed, position)):
            row = np.asarray([tokens if m == name else row[k] if m in kept else 0 for k, m in enumerate(names)])
        return row
