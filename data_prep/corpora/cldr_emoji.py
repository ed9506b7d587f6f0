"""Emoji with their names in 91 languages, from Unicode's CLDR: subsets ``noto``, ``twitter`` and ``fluent``, as in
``emoji.py``.

A text is a name alone; its language is the field ``language``, which a text modality can read (docs/data_format.md).
Pairs of (emoji, language) are held out, not emoji: a model has seen an emoji of the validation or test split in other
languages, and the language with other emoji. Pairs with the same name, of one emoji in two languages or of two emoji
in one language, are one group, so that no held-out name was seen for its emoji or in its language. All styles of a
pair are in one split.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mmmoe_pretrain.data_prep.corpora.emoji import STYLES, Emoji, Style, code_points, fetch_catalogue
from mmmoe_pretrain.data_prep.corpora.packages import fetch_debian
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.rows.splits import group_items, normalise_text, split_of
from mmmoe_pretrain.progress import track

PACKAGE = "unicode-cldr-core"
SPLIT_SALT = "cldr-emoji"
FOLDERS = ("annotations", "annotationsDerived")  # of single code points and of sequences
INHERITED = "↑↑↑"  # a name that is that of the parent language
COMPLETE = 0.9  # of the emoji that a language must name to be one of the corpus

Names = Mapping[str, str]


def build(out: Path, languages: Sequence[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Fetch images and names into ``out``; of ``languages``, or of all that name nearly every emoji."""
    catalogue = fetch_catalogue(out, ("en",))
    folder, version = fetch_debian(PACKAGE, out)
    names = chosen(read_names(folder / "usr/share/unicode/cldr/common"), catalogue, languages)
    groups = group_pairs(catalogue, names)
    rows: list[Row] = []
    notes: Counter[str] = Counter()
    for style in STYLES:
        files = style.images(out)
        for code, path in track(sorted(files.items()), f"naming {style.name}", len(files), "images"):
            if code in catalogue:
                pairs = {language: its[code] for language, its in names.items() if code in its}
                image = path.relative_to(out).as_posix()
                rows += emoji_rows(catalogue[code], style, image, pairs, groups, version)
            else:
                notes[f"{style.name} images without a name (skin tones, retired)"] += 1
    return rows, dict(notes)


def emoji_rows(
    emoji: Emoji, style: Style, image: str, names: Names, groups: Mapping[str, str], version: str
) -> Iterator[Row]:
    """``names``: of this emoji, by language."""
    for language, name in names.items():
        group = groups[f"{emoji.code}-{language}"]
        yield Row(
            key=f"cldr-{style.name}-{emoji.code}-{language.lower()}",
            image=image,
            text=name,
            language=language.lower(),
            label=emoji.label,
            group=group,
            split=split_of(group, SPLIT_SALT),
            subset=style.name,
            source=f"{style.source}, {PACKAGE} {version}",
            licence=f"{style.licence} AND Unicode-DFS-2016",
            attribution=f"{style.attribution}; names (c) Unicode, Inc.",
        )


def read_names(common: Path) -> dict[str, dict[str, str]]:
    """The names of each language of CLDR, by code points without the variation selector."""
    found: dict[str, dict[str, str]] = {}
    files = [path for name in FOLDERS for path in sorted((common / name).glob("*.xml"))]
    if not files:
        raise ValueError(
            f"{PACKAGE} has no names in {'/ and '.join(FOLDERS)}/ where 41 has them; its layout has changed"
        )
    for path in track(files, "reading names", len(files), "files"):
        names = found.setdefault(path.stem, {})
        for annotation in ElementTree.parse(path).getroot().iter("annotation"):
            text = " ".join((annotation.text or "").split())
            if annotation.get("type") == "tts" and text and text != INHERITED:
                points = "-".join(f"{ord(point):x}" for point in annotation.get("cp", ""))
                names[code_points(points)] = text
    return found


def chosen(
    names: Mapping[str, Names], catalogue: Mapping[str, Emoji], languages: Sequence[str]
) -> dict[str, dict[str, str]]:
    """The names of emoji in ``languages``; without any, in those that name ``COMPLETE`` of them, but not in varieties
    (pt_PT, sr_Latn), whose names are mostly those of the language. Raises ValueError for an unknown one."""
    of_emoji = {
        language: {code: name for code, name in its.items() if code in catalogue} for language, its in names.items()
    }
    if unknown := sorted(set(languages) - names.keys()):
        raise ValueError(f"CLDR has no emoji names in {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    if languages:
        return {language: of_emoji[language] for language in sorted(set(languages))}
    return {
        language: its
        for language, its in sorted(of_emoji.items())
        if "_" not in language and len(its) >= COMPLETE * len(catalogue)
    }


def group_pairs(catalogue: Mapping[str, Emoji], names: Mapping[str, Names]) -> dict[str, str]:
    """The group of each pair ``CODE-LANGUAGE``."""
    tokens = {}
    for code in sorted(catalogue):
        for language, its in names.items():
            if code in its:
                name = normalise_text(its[code])
                tokens[f"{code}-{language}"] = (f"emoji:{code}:{name}", f"language:{language}:{name}")
    return group_items(tokens)
