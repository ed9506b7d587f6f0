"""WordNet's synsets: English words with one meaning, its gloss and examples, as in a dictionary.

A line of ``data.noun`` (``man 5 wndb``) has an offset, a number, the part of speech, the count of words in
hexadecimal, the words each with a number, pointers to other synsets, and the gloss behind `` | ``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mmmoe_pretrain.data_prep.corpora.packages import fetch_debian
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.rows.splits import group_items, near_tokens, normalise_text, split_of
from mmmoe_pretrain.progress import track

PACKAGE = "wordnet-base"
FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
SPLIT_SALT = "wordnet"
_PARTS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
_POSITION = re.compile(r"\((?:a|p|ip)\)$")  # of an adjective: only before a noun, only behind a verb
_EXAMPLE = re.compile(r'"([^"]+)"')


class Synset(NamedTuple):
    """Words of one meaning."""

    key: str
    part: str
    words: tuple[str, ...]
    gloss: str

    @property
    def text(self) -> str:
        return f"{', '.join(self.words)} ({self.part}): {self.gloss}"

    @property
    def tokens(self) -> list[str]:
        """What may not be in two splits: its definition, also with another word in it, and each of its examples."""
        definition = self.gloss.partition('"')[0]
        return near_tokens(definition) + [normalise_text(text) for text in _EXAMPLE.findall(self.gloss)]


def build(out: Path, languages: Sequence[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Fetch the synsets into ``out``; their one language is English."""
    if other := sorted(set(languages) - {"en"}):
        raise ValueError(f"wordnet has no language {', '.join(other)}; it has en")
    folder, version = fetch_debian(PACKAGE, out)
    files = [folder / "usr/share/wordnet" / name for name in FILES]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ValueError(f"{PACKAGE} {version} lacks {', '.join(missing)}, which 3.0-37 has; its layout has changed")
    return rows_of([synset for path in files for synset in read_synsets(path)], f"{PACKAGE} {version}"), {}


def read_synsets(path: Path) -> Iterator[Synset]:
    """The synsets of a file; its licence is in lines that begin with a space."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith(" "):
            try:
                yield _synset(line)
            except (ValueError, LookupError):
                raise ValueError(
                    f"{path.name}, line {number} is no synset; the layout of {PACKAGE} has changed"
                ) from None


def rows_of(synsets: Sequence[Synset], source: str) -> list[Row]:
    """A row a synset. Those with nearly the same definition or the same example are one group, in one split."""
    groups = group_items({synset.key: synset.tokens for synset in track(synsets, "reading", len(synsets), "synsets")})
    return [
        Row(
            key=synset.key,
            text=synset.text,
            language="en",
            group=groups[synset.key],
            split=split_of(groups[synset.key], SPLIT_SALT),
            subset=synset.part,
            source=source,
            licence="WordNet-3.0",
            attribution="WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved.",
        )
        for synset in synsets
    ]


def _synset(line: str) -> Synset:
    head, separator, gloss = line.partition(" | ")
    offset, _, kind, count, *rest = head.split(" ")
    words = rest[: 2 * int(count, 16) : 2]
    if not separator or len(words) != int(count, 16):
        raise ValueError
    return Synset(
        key=f"wordnet-{_PARTS[kind]}-{offset}",
        part=_PARTS[kind],
        words=tuple(_POSITION.sub("", word).replace("_", " ") for word in words),
        gloss=" ".join(gloss.split()),
    )
