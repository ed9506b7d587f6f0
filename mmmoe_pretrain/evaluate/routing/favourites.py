"""The tokens that each expert likes best: of those that it served, the ones to which its router gave
the highest probability.

Distinct content comes first: one token of each picture, clip or text, as long as there are enough of
them; equal pictures of two samples count as one. The selection is exact however the rows are batched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmmoe_pretrain.batch import MODALITIES, TASKS, Sample
from mmmoe_pretrain.evaluate.features import content_name
from mmmoe_pretrain.evaluate.routing.record import Decisions, Origins


@dataclass(frozen=True)
class Favourite:
    """A token. ``place`` is that of ``record.Origins``, ``content`` the name of what it is a part of."""

    log_p: float
    modality: str
    task: str
    place: int
    content: str
    sample: Sample

    @property
    def probability(self) -> float:
        return float(np.exp(self.log_p))


@dataclass
class _Best:
    """The best tokens so far of one expert and modality: of distinct content, and of distinct places."""

    by_content: list[Favourite] = field(default_factory=list)
    by_place: list[Favourite] = field(default_factory=list)


class FavouriteSearch:
    """Collects batch by batch; ``of(layer, expert)`` are the ``top`` best of each modality."""

    def __init__(self, top: int) -> None:
        self.top = top
        self._best: defaultdict[tuple[int, int, str], _Best] = defaultdict(_Best)

    def add(
        self, decisions: Sequence[Decisions], origins: Origins, task_n: np.ndarray, samples: Sequence[Sample]
    ) -> None:
        """Look through the tokens of one batch."""
        names = [{m: content_name(s, m) for m in MODALITIES if s.has(m)} for s in samples]
        for layer in decisions:
            for m, modality in enumerate(MODALITIES):
                rows = np.flatnonzero(origins.modality_n == m)
                for expert in np.flatnonzero(layer.served_nE[rows].any(0)).tolist():
                    mine = rows[layer.served_nE[rows, expert]]
                    order = mine[np.argsort(-layer.log_p_nE[mine, expert], kind="stable")].tolist()
                    found = (
                        _favourite(row, modality, float(layer.log_p_nE[row, expert]), origins, task_n, samples, names)
                        for row in order
                    )
                    self._merge(self._best[layer.layer, expert, modality], found)

    def of(self, layer: int, expert: int) -> dict[str, list[Favourite]]:
        """By modality, the most probable first; a modality that the expert never served is left out."""
        return {m: self._chosen(self._best[layer, expert, m]) for m in MODALITIES if (layer, expert, m) in self._best}

    def _merge(self, best: _Best, found: Iterable[Favourite]) -> None:
        """``found`` runs from the most probable on and is read no further than needed."""
        new = _Best()
        contents: set[Hashable] = set()
        places: set[Hashable] = set()
        for token in found:
            if len(places) < self.top and _place(token) not in places:
                new.by_place.append(token)
                places.add(_place(token))
            if token.content not in contents:
                new.by_content.append(token)
                contents.add(token.content)
                if len(contents) == self.top:  # and then as many places
                    break
        best.by_content = _distinct(best.by_content + new.by_content, lambda t: t.content, self.top)
        best.by_place = _distinct(best.by_place + new.by_place, _place, self.top)

    def _chosen(self, best: _Best) -> list[Favourite]:
        chosen = {_place(token): token for token in best.by_content}
        for token in best.by_place:
            if len(chosen) < self.top:
                chosen.setdefault(_place(token), token)
        return sorted(chosen.values(), key=lambda token: -token.log_p)


def _favourite(
    row: int,
    modality: str,
    log_p: float,
    origins: Origins,
    task_n: np.ndarray,
    samples: Sequence[Sample],
    names: Sequence[dict[str, str]],
) -> Favourite:
    sample = int(origins.sample_n[row])
    return Favourite(
        log_p,
        modality,
        TASKS[int(task_n[row])],
        int(origins.place_n[row]),
        names[sample][modality],
        samples[sample],
    )


def _place(token: Favourite) -> Hashable:
    return token.content, token.place


def _distinct(tokens: list[Favourite], key: Callable[[Favourite], Hashable], limit: int) -> list[Favourite]:
    """The most probable tokens, one of each key; the earlier of equals."""
    first: dict[Hashable, Favourite] = {}
    for token in sorted(tokens, key=lambda token: -token.log_p):
        first.setdefault(key(token), token)
        if len(first) == limit:
            break
    return list(first.values())
