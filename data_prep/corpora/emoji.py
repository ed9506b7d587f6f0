"""Emoji in three art styles with their names: subsets ``noto``, ``twitter`` and ``fluent``.

Images and names are joined on code points without the variation selector. Variants of one emoji by gender and skin,
and all flags of countries, are one group, so that near-duplicates are never in two splits.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmoe_pretrain.data_prep.corpora.packages import fetch_npm
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.rows.splits import file_token, group_items, normalise_text, split_of

SPLIT_SALT = "emoji"
_NAMES = ("emojibase-data", "17.0.0")
_COMPONENT = "component"  # skin tones and hair: parts, not emoji
_PEOPLE = frozenset({"1f466", "1f467", "1f468", "1f469", "1f474", "1f475", "1f9d1", "1f9d2", "1f9d3"})
_DROPPED = frozenset({"200d", "2640", "2642", "27a1", "1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})


@dataclass(frozen=True, slots=True)
class Style:
    """An art style: its package and licence."""

    name: str
    package: str
    version: str
    folder: str
    licence: str
    attribution: str

    def images(self, work: Path) -> dict[str, Path]:
        """Code points -> file, fetched into ``work``."""
        folder = fetch_npm(self.package, self.version, work) / self.folder
        found = {
            code_points(path.stem): path for path in sorted(folder.glob("*")) if path.suffix in (".png", ".webp")
        }
        if not found:
            raise ValueError(f"{self.package}@{self.version} has no images in {self.folder}; its layout has changed")
        return found

    @property
    def source(self) -> str:
        return f"{self.package} {self.version}"


STYLES = (
    Style("noto", "emoji-datasource-google", "16.0.0", "img/google/64", "Apache-2.0", "Noto Emoji, (c) Google"),
    Style(
        "twitter",
        "emoji-datasource-twitter",
        "16.0.0",
        "img/twitter/64",
        "CC-BY-4.0",
        "Twemoji, (c) Twitter, Inc and other contributors",
    ),
    Style("fluent", "@lobehub/fluent-emoji-3d", "1.1.0", "assets", "MIT", "Fluent Emoji, (c) Microsoft Corporation"),
)


@dataclass(frozen=True, slots=True)
class Emoji:
    """An emoji without its images."""

    code: str  # lower-case hexadecimal code points joined by -, without FE0F
    label: str  # its group: "animals & nature", ...
    names: dict[str, str]  # language -> name

    @property
    def family(self) -> str:
        """The code points without gender, skin and direction; one name for all country flags."""
        points = ["person" if point in _PEOPLE else point for point in self.code.split("-") if point not in _DROPPED]
        if all("1f1e6" <= point <= "1f1ff" for point in points) or "e007f" in points:
            return "country-flag"
        return "-".join(dict.fromkeys(points))


def build(out: Path, languages: Sequence[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Fetch all styles into ``out``; names in ``languages`` (none: English)."""
    catalogue = fetch_catalogue(out, tuple(languages) or ("en",))
    images = {style: style.images(out) for style in STYLES}
    groups = group_emoji(catalogue, images.values())
    rows: list[Row] = []
    notes: Counter[str] = Counter()
    for style, files in images.items():
        for code, path in sorted(files.items()):
            if code in catalogue:
                rows += emoji_rows(catalogue[code], style, path.relative_to(out).as_posix(), groups[code])
            else:
                notes[f"{style.name} images without a name (skin tones, retired)"] += 1
    return rows, dict(notes)


def fetch_catalogue(work: Path, languages: Sequence[str]) -> dict[str, Emoji]:
    """Code points -> emoji, with names in ``languages``."""
    root = fetch_npm(*_NAMES, work)
    labels = {
        group["order"]: group["message"]
        for group in _read(root, "en", "messages.json")["groups"]
        if group["key"] != _COMPONENT
    }
    names: dict[str, dict[str, str]] = {}
    group_of: dict[str, int] = {}
    for language in languages:
        for item in _read(root, language, "data.json"):
            code = code_points(item["hexcode"])
            if item.get("group") in labels:
                names.setdefault(code, {})[language.replace("-", "_")] = item["label"].strip()
                group_of[code] = item["group"]
    return {code: Emoji(code, labels[group_of[code]], by_language) for code, by_language in names.items()}


def group_emoji(catalogue: dict[str, Emoji], images: Iterable[dict[str, Path]]) -> dict[str, str]:
    """The group of each emoji: its family, and all that share an image or a name with it."""
    tokens = {
        code: [f"family:{emoji.family}"]
        + [f"{language}:{normalise_text(name)}" for language, name in emoji.names.items()]
        for code, emoji in catalogue.items()
    }
    for files in images:
        for code in files.keys() & tokens.keys():
            tokens[code].append(file_token(files[code]))
    return {code: f"emoji-{group}" for code, group in group_items(tokens).items()}


def emoji_rows(emoji: Emoji, style: Style, image: str, group: str) -> list[Row]:
    return [
        Row(
            key=f"emoji-{style.name}-{emoji.code}-{language.lower()}",
            image=image,
            text=name,
            language=language.lower(),
            label=emoji.label,
            group=group,
            split=split_of(group, SPLIT_SALT),
            subset=style.name,
            source=style.source,
            licence=style.licence,
            attribution=style.attribution,
        )
        for language, name in emoji.names.items()
    ]


def code_points(name: str) -> str:
    return "-".join(point for point in name.lower().split("-") if point != "fe0f")


def _read(root: Path, language: str, name: str) -> Any:
    path = root / language / name
    if not path.is_file():
        known = sorted(folder.name for folder in root.iterdir() if (folder / "data.json").is_file())
        raise ValueError(f"no emoji names in language {language!r}; there are {', '.join(known)}")
    return json.loads(path.read_text(encoding="utf-8"))
