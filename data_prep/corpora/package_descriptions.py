"""What Debian's packages are, in the words of their maintainers and of translators, from apt's lists.

A list has a stanza a package: ``Description-md5`` is the hash of the English description, which its translations
repeat; ``Description-de`` is a title and, behind it, paragraphs between lines with a dot. A text is
``PACKAGE - TITLE: PARAGRAPHS``.

A description and its translations are one group, with others of the same title (``Compiler (documentation)``) or with
a short paragraph that is the same but for one word.
Packages share much of their descriptions: a paragraph stays in the first package that has it, also where only numbers
and the package's name differ, so that no paragraph is in two groups. Packages with nothing of their own are left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from mmmoe_pretrain.data_prep.corpora.manuals import ORIGINAL, clean
from mmmoe_pretrain.data_prep.corpora.packages import Translations, fetch_translations
from mmmoe_pretrain.data_prep.rows.row import Row, sample_key
from mmmoe_pretrain.data_prep.rows.splits import group_items, near_tokens, normalise_text, split_of
from mmmoe_pretrain.progress import track

LANGUAGES = (  # in which Debian 12 has more than a few descriptions
    "en", "cs", "da", "de", "es", "fi", "fr", "hu", "it", "ja", "ko",
    "nl", "pl", "pt", "pt_BR", "ru", "sk", "sr", "sv", "uk", "zh_CN", "zh_TW",
)  # fmt: skip
SHORT = 25  # words of a paragraph that may be a form, such as "This package provides the development files of X"
SPLIT_SALT = "package-descriptions-3"  # puts the largest group, 7% of the packages, into train
_FIELD = re.compile(r"^(Package|Description-md5|Description-[A-Za-z_]+): ?(.*(?:\n .*)*)", re.M)
_DOT = re.compile(r"^ \.[ \t]*$", re.M)
_VARIANT = re.compile(r" [-–—(]|[:;,] ")  # what follows in a title tells packages of one program apart
_DIGITS = re.compile(r"\d+")


class Description(NamedTuple):
    """A stanza of a list."""

    release: str
    package: str
    digest: str
    title: str
    paragraphs: tuple[str, ...]


class Original(NamedTuple):
    """What is kept of an English description, for its translations."""

    package: str
    title: str
    words: tuple[str | None, ...]  # of each paragraph, normalised; None: an earlier package has it


def build(out: Path, languages: Sequence[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Fetch the lists into ``out``. English is always read: it decides what is kept, and the groups."""
    spelled = {language.lower(): language for language in LANGUAGES}
    wanted = list(dict.fromkeys(language.lower().replace("-", "_") for language in languages)) or list(spelled)
    if unknown := sorted(set(wanted) - spelled.keys()):
        raise ValueError(f"package-descriptions has no language {', '.join(unknown)}; there are {', '.join(spelled)}")
    lists = fetch_translations([spelled[language] for language in dict.fromkeys([ORIGINAL, *wanted])], out)
    if missing := sorted({ORIGINAL, *wanted} - {found.language.lower() for found in lists}):
        raise ValueError(f"apt-get has no descriptions of packages in {', '.join(missing)}; is the network up?")
    return rows_of(lists, wanted)


def rows_of(lists: Sequence[Translations], languages: Sequence[str]) -> tuple[list[Row], dict[str, int]]:
    """The rows in ``languages``, and what was left out."""
    by_language: dict[str, list[Translations]] = {}
    for found in lists:
        by_language.setdefault(found.language.lower(), []).append(found)
    originals = read_originals(by_language[ORIGINAL])
    groups = group_items({original.package: _tokens(original) for original in originals.values()})
    notes: Counter[str] = Counter()
    rows = [
        row
        for language in languages
        for row in _rows_in(language, by_language.get(language, ()), originals, groups, notes)
    ]
    return rows, dict(notes)


def read_descriptions(found: Translations) -> Iterator[Description]:
    """The stanzas of a list, in its order."""
    stanzas = found.path.read_text(encoding="utf-8", errors="replace").split("\n\n")
    for stanza in track(stanzas, f"reading {found.language}", len(stanzas), "descriptions"):
        fields: dict[str, str] = dict(_FIELD.findall(stanza))
        package, digest = fields.pop("Package", ""), fields.pop("Description-md5", "")
        if package and digest and fields:
            title, _, body = fields.popitem()[1].partition("\n")
            parts = (clean(part) for part in _DOT.split(body))
            yield Description(found.release, package, digest, clean(title), tuple(part for part in parts if part))
        elif stanza.strip():
            raise ValueError(f"{found.path.name} has a stanza without package, hash or description: {stanza[:80]!r}")


def read_originals(lists: Iterable[Translations]) -> dict[str, Original]:
    """The English descriptions with paragraphs of their own, by their hash."""
    originals: dict[str, Original] = {}
    packages: set[str] = set()
    seen: set[str] = set()
    for found in lists:
        for description in read_descriptions(found):
            package = description.package
            if package not in packages:  # updates of a release have packages again
                packages.add(package)
                words = tuple(_if_new(text, package, seen) for text in description.paragraphs)
                if any(words):
                    originals[description.digest] = Original(package, description.title, words)
    return originals


def _rows_in(
    language: str,
    lists: Iterable[Translations],
    originals: Mapping[str, Original],
    groups: Mapping[str, str],
    notes: Counter[str],
) -> Iterator[Row]:
    seen: set[str] = set()
    done: set[str] = set()
    for found in lists:
        for description in read_descriptions(found):
            original = originals.get(description.digest)
            if original is None or description.digest in done:
                notes["descriptions that others have"] += 1
                continue
            done.add(description.digest)
            if len(description.paragraphs) != len(original.words):
                notes["translations with more or fewer paragraphs than the original"] += 1
            elif own := list(_own(language, description, original, seen)):
                yield _row(language, description, " ".join(own), original, groups[original.package])
            else:
                notes["translations that are copies"] += 1


def _own(language: str, description: Description, original: Original, seen: set[str]) -> Iterator[str]:
    """The paragraphs that no earlier description in ``language`` has, and that are translated."""
    for text, words in zip(description.paragraphs, original.words, strict=True):
        if words is None:
            continue
        if language == ORIGINAL or (normalise_text(text) != words and _if_new(text, original.package, seen)):
            yield text


def _if_new(text: str, package: str, seen: set[str]) -> str | None:
    """The words of ``text``, or None where it was seen, if need be with other numbers and another package's name."""
    words = normalise_text(text)
    name = set(_DIGITS.sub("", normalise_text(package)).split())
    forms = {words, " ".join(word for word in _DIGITS.sub("", words).split() if word not in name)}
    if not forms.isdisjoint(seen):
        return None
    seen |= forms
    return words


def _tokens(original: Original) -> Iterator[str]:
    """What may not be in two splits: the title that packages of one program share, and short paragraphs, of which
    others may be the same but for one word."""
    title = _VARIANT.split(original.title)[0]
    yield "title:" + _DIGITS.sub("", normalise_text(title or original.title))
    for words in original.words:
        if words and len(words.split()) <= SHORT:
            yield from near_tokens(words)


def _row(language: str, description: Description, text: str, original: Original, group: str) -> Row:
    title = "" if language != ORIGINAL and description.title == original.title else f" - {description.title}"
    return Row(
        key=sample_key(f"description-{original.package}-{language}"),
        text=f"{original.package}{title}: {text}",
        language=language,
        group=f"description-{group}",
        split=split_of(group, SPLIT_SALT),
        subset="descriptions",
        source=f"Debian {description.release}, Translation-{language}",
        licence="that of each package (debian/copyright)",
        attribution="maintainers of Debian's packages"
        + (", translators of the DDTP" if language != ORIGINAL else ""),
    )
