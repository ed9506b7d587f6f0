"""Paragraphs of Debian's manuals in HTML, with a folder a language: prose on the same subjects in many languages,
some of it translated in part.

A page and its translations are one group, so that no paragraph is in another split than its translations. Pages that
have an anchor of the same name or a paragraph of the same words belong together: the chapters of a translation may
have other numbers than those of the original.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from mmmoe_pretrain.data_prep.corpora.packages import fetch_debian
from mmmoe_pretrain.data_prep.rows.row import Row, slug
from mmmoe_pretrain.data_prep.rows.splits import group_items, normalise_text, split_of
from mmmoe_pretrain.progress import track

MIN_CHARACTERS = 20  # shorter ones are labels
ORIGINAL = "en"
_INLINE = frozenset(("a", "abbr", "acronym", "b", "bdo", "cite", "code", "dfn", "em", "font", "i", "kbd", "q", "samp",
                     "small", "span", "strong", "sub", "tt", "u", "var"))  # fmt: skip
_VOID = frozenset(("area", "br", "col", "hr", "img", "input", "link", "meta", "wbr"))
_DROPPED = frozenset(("head", "pre", "script", "style", "sup"))  # sup: the number of a footnote
_DROPPED_CLASSES = frozenset(("title", "titlepage", "toc", "navheader", "navfooter", "docnav"))
_GENERATED = re.compile(r"id[a-z]?[-.\d]")  # names of anchors that differ between languages: idm140, id-1.2.3
_REGIONS_MATTER = ("pt", "zh")
_CJK = "[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]"  # not Hangul, which has spaces
_BREAK_IN_CJK = re.compile(rf"(?<={_CJK})[ \t]*\n\s*(?={_CJK})")


@dataclass(frozen=True, slots=True)
class Manual:
    """A package that has a manual in several languages."""

    name: str
    package: str
    folder: str  # of the languages' folders
    version: str  # that was read when this was written
    licence: str
    attribution: str


MANUALS = {
    manual.name: manual
    for manual in (
        Manual(
            name="debian-handbook",
            package="debian-handbook",
            folder="usr/share/doc/debian-handbook/html",
            version="11.20220922",
            licence="GPL-2.0-or-later OR CC-BY-SA-3.0",
            attribution="The Debian Administrator's Handbook, (c) Raphaël Hertzog, Roland Mas, Freexian SARL, "
            "translators",
        ),
        Manual(
            name="installation-guide",
            package="installation-guide-amd64",
            folder="usr/share/doc/installation-guide-amd64",
            version="20230508",
            licence="GPL-2.0-only",
            attribution="Debian GNU/Linux Installation Guide, (c) 2004-2023 the Debian Installer team and other "
            "contributors",
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Page:
    """What is read of an HTML file."""

    language: str
    name: str
    anchors: tuple[str, ...]
    paragraphs: tuple[str, ...]


def build_manual(manual: Manual, out: Path, languages: Sequence[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Fetch the manual into ``out``; the rows of ``languages``, or of all. Splits do not depend on ``languages``."""
    folder, version = fetch_debian(manual.package, out)
    pages = read_pages(folder / manual.folder)
    known = dict.fromkeys(page.language for page in pages)
    if ORIGINAL not in known:
        raise ValueError(
            f"{manual.package} {version} has no English pages in {manual.folder} where {manual.version} has them; "
            f"its layout has changed"
        )
    wanted = {language.lower().replace("-", "_") for language in languages} or set(known)
    if unknown := sorted(wanted - known.keys()):
        raise ValueError(f"{manual.name} has no language {', '.join(unknown)}; there are {', '.join(known)}")
    notes: Counter[str] = Counter()
    return list(rows_of(manual, pages, wanted, f"{manual.package} {version}", notes)), dict(notes)


def read_pages(root: Path) -> list[Page]:
    """The pages of all languages, by language and name."""
    files = sorted(root.glob("*/*.html"))
    return [read_page(path) for path in track(files, "reading", len(files), "pages")]


def read_page(path: Path) -> Page:
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf-8", errors="replace"))
    reader.close()
    paragraphs = (clean(text) for text in reader.found)
    return Page(
        language=language_of(path.parent.name),
        name=slug(path.stem),
        anchors=tuple(reader.anchors),
        paragraphs=tuple(text for text in paragraphs if len(text) >= MIN_CHARACTERS),
    )


def rows_of(
    manual: Manual, pages: Sequence[Page], wanted: set[str], source: str, notes: Counter[str]
) -> Iterator[Row]:
    """A row a paragraph; of those with the same words in one language, the first."""
    groups = group_pages(manual.name, pages)
    original = {run for page in pages if page.language == ORIGINAL for text in page.paragraphs for run in _runs(text)}
    seen: set[tuple[str, str]] = set()
    for page in (page for page in pages if page.language in wanted):
        group = groups[_key(manual.name, page)]
        for number, text in enumerate(page.paragraphs, 1):
            words = normalise_text(text)
            if page.language != ORIGINAL and _mostly(original, _runs(text)):
                notes["paragraphs that are not translated"] += 1
            elif (page.language, words) in seen:
                notes["paragraphs that repeat an earlier one"] += 1
            else:
                seen.add((page.language, words))
                yield Row(
                    key=f"{_key(manual.name, page)}-{number}",
                    text=text,
                    language=page.language,
                    group=group,
                    split=split_of(group, manual.name),
                    subset="paragraphs",
                    source=source,
                    licence=manual.licence,
                    attribution=manual.attribution,
                )


def group_pages(name: str, pages: Sequence[Page]) -> Mapping[str, str]:
    """The group of each page."""
    return group_items(
        {
            _key(name, page): [
                *(f"anchor:{anchor}" for anchor in page.anchors),
                *(f"text:{normalise_text(text)}" for text in page.paragraphs),
            ]
            for page in pages
        }
    )


def language_of(folder: str) -> str:
    """``de`` of ``de-DE``, but ``pt_br`` of ``pt-BR``."""
    name = folder.lower().replace("-", "_")
    language = name.partition("_")[0]
    return name if language in _REGIONS_MATTER else language


def clean(text: str) -> str:
    """``text`` in one line; a break between two Chinese or Japanese letters is no space."""
    return " ".join(_BREAK_IN_CJK.sub("", text).split())


def _runs(text: str) -> list[str]:
    """Each four consecutive words of ``text``."""
    words = normalise_text(text).split()
    return [" ".join(words[start : start + 4]) for start in range(max(1, len(words) - 3))]


def _mostly(known: Set[str], runs: Sequence[str]) -> bool:
    """Whether more than half of ``runs`` are known: a translation has some of its original's, such as commands, and a
    paragraph that is not translated may be that of an earlier edition."""
    return 2 * sum(run in known for run in runs) > len(runs)


def _key(name: str, page: Page) -> str:
    return f"{name}-{page.language}-{page.name}"


class _Reader(HTMLParser):
    """Collects the text of paragraphs, without listings, titles and navigation, and the names of anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.anchors: list[str] = []
        self._nowhere: list[str] = []
        self._open: list[tuple[str, list[str] | None]] = []  # elements, and where their own text goes

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        anchor = values.get("id") or values.get("name")
        if tag == "a" and anchor and not _GENERATED.match(anchor):
            self.anchors.append(anchor)
        if tag in _VOID:
            self.handle_data(" ")
            return
        if tag not in _INLINE and tag != "sup":
            self.handle_data(" ")
        self._open.append((tag, self._target(tag, (values.get("class") or "").split())))

    def handle_endtag(self, tag: str) -> None:
        if all(tag != name for name, _ in self._open):
            return
        name = ""
        while name != tag:
            name, target = self._open.pop()
            if target is not None and target is not self._parent() and target is not self._nowhere:
                self.found.append("".join(target))

    def handle_data(self, data: str) -> None:
        target = self._parent()
        if target is not None and target is not self._nowhere:
            target.append(data)

    def _parent(self) -> list[str] | None:
        return self._open[-1][1] if self._open else None

    def _target(self, tag: str, classes: Sequence[str]) -> list[str] | None:
        parent = self._parent()
        if parent is self._nowhere or tag in _DROPPED or not _DROPPED_CLASSES.isdisjoint(classes):
            return self._nowhere
        if tag == "p" or "para" in classes:
            return []
        return parent if tag in _INLINE else None
