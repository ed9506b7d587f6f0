"""GCIDE's dictionary entries: English prose for language models, without images or audio.

A dictd database: ``gcide.dict.dz`` is gzip, and each line of ``gcide.index`` is a headword, the first byte and the
length of an entry (numbers in base 64). Several headwords may share an entry, and a headword may have several.
"""

from __future__ import annotations

import gzip
import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmmoe_pretrain.data_prep.corpora.packages import fetch_debian
from mmmoe_pretrain.data_prep.rows.row import Row, slug
from mmmoe_pretrain.data_prep.rows.splits import group_items, normalise_text, split_of
from mmmoe_pretrain.progress import track

PACKAGE = "dict-gcide"
SPLIT_SALT = "gcide"  # puts the largest group, 9% of the entries, which names of compounds join, into train
_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
_ABOUT = "00-"  # of headwords of entries that describe the database
_PRONUNCIATION = re.compile(r"\s*\\[^\\]*\\")
_SOURCE = re.compile(r"\s*\[(?:[^\]]*(?:Webster|WordNet|Century Dict|PJC)[^\]]*|RP|RDH|AS|WKH|JDS)\]")


def build(out: Path, languages: Sequence[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Fetch the dictionary into ``out``; its one language is English."""
    if other := sorted(set(languages) - {"en"}):
        raise ValueError(f"gcide has no language {', '.join(other)}; it has en")
    folder, version = fetch_debian(PACKAGE, out)
    index, database = (folder / "usr/share/dictd" / name for name in ("gcide.index", "gcide.dict.dz"))
    if not (index.is_file() and database.is_file()):
        raise ValueError(f"{PACKAGE} {version} has no {index.name} where 0.48.5 has it; its layout has changed")
    return rows_of(read_entries(index, database), f"{PACKAGE} {version}"), {}


def read_entries(index: Path, database: Path) -> dict[str, list[str]]:
    """Each distinct entry in the order of the database, and its headwords."""
    headwords: dict[tuple[int, int], list[str]] = {}
    for line in index.read_text(encoding="utf-8").splitlines():
        word, *numbers = line.split("\t")
        if not word.startswith(_ABOUT):
            headwords.setdefault((_number(numbers[0]), _number(numbers[1])), []).append(word)
    content = gzip.decompress(database.read_bytes())
    found: dict[str, list[str]] = {}
    for (start, length), words in sorted(headwords.items()):
        found.setdefault(content[start : start + length].decode(errors="replace"), []).extend(words)
    return found


def rows_of(entries: dict[str, list[str]], source: str) -> list[Row]:
    """A row an entry. Entries that share a headword or a text are one group, and so in one split."""
    texts: dict[str, str] = {}
    identity: dict[str, list[str]] = {}
    numbers: Counter[str] = Counter()
    for entry, words in track(entries.items(), "reading", len(entries), "entries"):
        name = slug(words[0])
        numbers[name] += 1
        key = f"gcide-{name}-{numbers[name]}"
        texts[key] = clean(entry)
        identity[key] = [*(f"word:{normalise_text(word)}" for word in words), f"text:{normalise_text(texts[key])}"]
    groups = group_items(identity)
    return [_row(key, text, groups[key], source) for key, text in texts.items()]


def clean(entry: str) -> str:
    """One line, without pronunciation, braces of cross-references and the names of sources."""
    text = _SOURCE.sub("", _PRONUNCIATION.sub("", entry)).replace("{", "").replace("}", "")
    return " ".join(text.split())


def _row(key: str, text: str, group: str, source: str) -> Row:
    return Row(
        key=key,
        text=text,
        language="en",
        group=group,
        split=split_of(group, SPLIT_SALT),
        subset="entries",
        source=source,
        licence="GPL-2.0-or-later",
        attribution="GNU Collaborative International Dictionary of English, P. Cassidy and contributors",
    )


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + _DIGITS.index(digit)
    return value
