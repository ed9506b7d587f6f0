"""What folders of shards hold, counted from their indices: what is read, and what is left out.

Shared by ``mmmoe train``, which refuses data that no objective of its config can use, and by ``mmmoe-data``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmmoe_pretrain.batch import MODALITIES
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import BadSampleError, raw_text, read_row
from mmmoe_pretrain.data.members import META, members_read, names
from mmmoe_pretrain.data.shards import ShardFolder

LOOKED_AT = 32  # samples of each kind whose JSON is searched for a text


@dataclass
class Survey:
    """Numbers of samples: all, by the modalities of their members, by an extension that is not read; and of shards
    that are not read (``*.tar.gz``)."""

    samples: int = 0
    modalities: Counter[tuple[str, ...]] = field(default_factory=Counter)
    unread: Counter[str] = field(default_factory=Counter)

    def add(self, extensions: tuple[str, ...], count: int = 1, *, captioned: bool = False) -> None:
        """``count`` samples whose members have these ``extensions``; ``captioned``: their JSON holds a text."""
        chosen = members_read(extensions)
        self.samples += count
        self.modalities[tuple(m for m in MODALITIES if m in chosen or (m == "text" and captioned))] += count
        self.unread.update({e: count for e in extensions if e != META and e not in chosen.values()})

    def content(self) -> str:
        """E.g. ``image+text 30, image 2``."""
        return ", ".join(f"{'+'.join(kind) or 'nothing'} {n:,}" for kind, n in self.modalities.most_common())

    def left_out(self) -> str:
        """E.g. ``right.png (32), cls (64)``; empty where all is read."""
        return names(f"{extension or 'no extension'} ({n:,})" for extension, n in self.unread.most_common())


def survey(folders: Sequence[ShardFolder]) -> Survey:
    """Of all samples. Whether the JSONs of a kind of sample hold texts is judged by a few of them."""
    found = Survey()
    for folder in folders:
        for extensions, count in folder.contents.items():
            captioned = "text" not in members_read(extensions) and _captioned(folder, extensions, LOOKED_AT)
            found.add(extensions, count, captioned=captioned)
        found.unread.update(folder.shards_left_out)
    return found


def refuse_useless(folders: Sequence[ShardFolder], found: Survey, config: RunConfig) -> list[str]:
    """The objectives of ``config`` that no sample seems to serve. Raises ValueError where there is none for any:
    then every JSON has been searched for texts."""
    needs, kinds, labelled = needed(config), set(found.modalities), config.data.label_text > 0
    for most in (LOOKED_AT, None):
        if not _served(needs, kinds) or (labelled and most):
            kinds |= set(_with_texts_of_json(folders, labelled, most))
    served = _served(needs, kinds)
    if not served:
        asked = "; ".join(f"{name} needs {' and '.join(sorted(wanted))}" for name, wanted in needs.items())
        unread = f"; not read: {found.left_out()}" if found.unread else ""
        raise ValueError(
            f"no sample of data.train serves an objective, so there is nothing to learn. {asked}. The "
            f"{found.samples:,} samples hold: {found.content()}{unread}. Correct data.train, the extensions of its "
            f"files (docs/data_format.md) or objectives.contrastive.pairs and objectives.captioning.prefixes"
        )
    return sorted(needs.keys() - served)


def needed(config: RunConfig) -> dict[str, set[str]]:
    """The modalities that a sample must have to serve each objective, by what an error calls it."""
    contrastive, captioning = config.objectives.contrastive, config.objectives.captioning
    pairs = [pair for pair, weight in contrastive.pairs.items() if contrastive.weight and weight]
    prefixes = captioning.prefixes if captioning.weight else ()
    return {
        **{f"contrastive {pair}": set(pair.split("-")) for pair in pairs},
        **{f"captioning of {prefix}": {prefix, "text"} for prefix in prefixes},
    }


def _served(needs: dict[str, set[str]], kinds: Iterable[tuple[str, ...]]) -> set[str]:
    return {name for name, wanted in needs.items() if any(wanted <= set(kind) for kind in kinds)}


def _with_texts_of_json(
    folders: Sequence[ShardFolder], labelled: bool, most: int | None
) -> Iterator[tuple[str, ...]]:
    """The modalities of samples whose JSON holds their text, or where ``labelled`` the label that stands for it."""
    for folder in folders:
        for extensions in folder.contents:
            chosen = members_read(extensions)
            if "text" not in chosen and _captioned(folder, extensions, most, labelled and "image" in chosen):
                yield (*chosen, "text")


def _captioned(folder: ShardFolder, extensions: tuple[str, ...], most: int | None, labelled: bool = False) -> bool:
    """Does the JSON of a sample with these ``extensions`` hold a text (or a label)? Of at most ``most`` samples."""
    if META not in extensions:
        return False
    places = folder.with_contents(extensions)
    if most is not None:
        places = places[np.unique(np.linspace(0, len(places) - 1, most).astype(int))]
    return any(_holds_text(folder, int(i), labelled) for i in places)


def _holds_text(folder: ShardFolder, i: int, labelled: bool) -> bool:
    raw = folder.read(i, only=(META,))
    try:
        row = read_row(raw)
        return bool(raw_text(raw, row) or (labelled and isinstance(row.get("label"), str) and row["label"]))
    except BadSampleError:
        return False
