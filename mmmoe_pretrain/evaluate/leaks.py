"""Held-out rows whose text was also trained on, perhaps by way of another corpus.

A corpus splits its own rows so that nothing leaks; a mix of corpora can still share a text ("four").
Such rows take no part in any score.
"""

from __future__ import annotations

import re
from pathlib import Path

from mmmoe_pretrain.batch import Sample
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import caption
from mmmoe_pretrain.data.shards import ShardFolder
from mmmoe_pretrain.progress import track

MAX_TEXTS = 500_000  # a training folder; what lies beyond is not compared


class LeakFilter:
    """Says of a held-out sample whether it is clean, and counts those that are not."""

    def __init__(self, config: RunConfig) -> None:
        self.dropped: set[str] = set()
        self.absent = [source.path for source in config.data.train if not Path(source.path).is_dir()]
        self._texts: set[str] = set()
        for source in config.data.train:
            if source.path not in self.absent:
                self._texts |= _texts(source.path)

    def clean(self, sample: Sample) -> bool:
        """True unless the sample's text stands in the training shards."""
        leaked = _words(sample.raw_text) in self._texts  # which never holds ""
        if leaked:
            self.dropped.add(sample.meta.identity)
        return not leaked

    def notes(self) -> list[str]:
        """What a reader of the scores should know."""
        notes = []
        if self.dropped:
            notes.append(f"{len(self.dropped)} held-out rows are left out: their texts are also trained on")
        if self.absent:
            notes.append(f"held-out texts are not compared with those of {self.absent[0]}: it is not here")
        return notes


def _texts(path: str) -> set[str]:
    folder = ShardFolder(path)
    count = min(len(folder), MAX_TEXTS)
    places = track(range(count), f"reading the texts of {path}", count, "samples")
    return {_words(caption(folder.read(i))) for i in places} - {""}


def _words(text: str) -> str:
    """The words alone: case, spacing and punctuation aside ("Four." is "four")."""
    return " ".join(re.findall(r"\w+", text.casefold()))
