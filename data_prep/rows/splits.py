"""Groups of samples that show the same thing, and their split into train, val and test.

Items that share a token (a normalised text, the hash of a file) are one group, found by union-find. All of a group is
in one split, chosen by a hash of its name.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

LEAST_NEAR_WORDS = 6  # of texts that are compared but for one word
VAL_FRACTION = 0.09
TEST_FRACTION = 0.21


def normalise_text(text: str) -> str:
    """The text without case, punctuation, and differences of spaces and of the encoding of accents."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = re.sub(r"[^\w\s]", " ", folded).split()
    return " ".join(words) or folded.strip()


def near_tokens(text: str) -> list[str]:
    """Tokens of ``text``: texts share one where they are equal, or differ in one word and are not short."""
    words = normalise_text(text).split()
    fewer = range(len(words)) if len(words) >= LEAST_NEAR_WORDS else range(0)
    return [" ".join(words), *(" ".join((*words[:at], *words[at + 1 :])) for at in fewer)]


def file_token(path: Path) -> str:
    """A token of the file's content."""
    return "file:" + hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def group_items(tokens_of: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The group of each item: the smallest name among the items it is connected with."""
    parent = {item: item for item in tokens_of}

    def root(item: str) -> str:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    owner: dict[str, str] = {}
    for item in sorted(tokens_of):
        for token in tokens_of[item]:
            first, second = sorted((root(owner.setdefault(token, item)), root(item)))
            parent[second] = first
    return {item: root(item) for item in tokens_of}


def split_of(group: str, salt: str, *, test: float = TEST_FRACTION, val: float = VAL_FRACTION) -> str:
    """The split of a group: the same on every machine, and independent of the other groups."""
    digest = hashlib.blake2b(f"{salt}:{group}".encode(), digest_size=8).digest()
    position = int.from_bytes(digest, "big") / 2**64
    if position < test:
        return "test"
    return "val" if position < test + val else "train"
