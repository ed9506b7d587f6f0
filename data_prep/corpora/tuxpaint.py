"""Tux Paint's stamps: images of real things, their names in many languages, speech and sound effects.

Subsets: ``named`` (image, English text), ``spoken`` (image, text and the same words spoken),
``translated`` (image and text of a language without speech), ``effect`` (image, English text, the
sound effect) and ``pronounced`` (letters and digits, with their spoken name).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmmoe_pretrain.data_prep.corpora.packages import fetch_debian
from mmmoe_pretrain.data_prep.rows.row import Row, slug
from mmmoe_pretrain.data_prep.rows.splits import file_token, group_items, normalise_text, split_of
from mmmoe_pretrain.progress import track

PACKAGE = "tuxpaint-stamps-default"
SPEECH_LANGUAGES = ("be", "bg", "ca", "da", "el", "en", "es", "fr", "ml", "nl", "pt_br", "ro", "ru")
TRANSLATED_LANGUAGES = (*SPEECH_LANGUAGES, "de", "it", "pt", "pl", "sv", "cs")
SPLIT_SALT = "tuxpaint-30"  # gives 544 / 67 / 174 stamps; groups are few, so their sizes decide the fractions
_LEFT_OUT = frozenset({"doppler_honk"})  # under a licence of its own
_NAMES_SPOKEN = ("symbols/math/", "symbols/alphabets/")  # here NAME.ogg is the spoken name, not a sound effect


@dataclass(frozen=True, slots=True)
class Stamp:
    """An image and all files beside it with the same name."""

    name: str  # path below the stamps' folder, without suffix
    image: Path
    texts: dict[str, str]  # language -> text
    speech: dict[str, Path]  # language -> the text, spoken
    effects: dict[str, Path]  # language, or "" -> NAME.ogg, NAME_<lang>.ogg

    @property
    def label(self) -> str:
        return self.name.split("/")[0]

    @property
    def key(self) -> str:
        return "tux-" + slug(self.name)


def build(out: Path, languages: Sequence[str] = ()) -> tuple[list[Row], dict[str, int]]:
    """Fetch the stamps into ``out``; ``languages`` are those of the ``translated`` subset."""
    folder, version = fetch_debian(PACKAGE, out)
    stamps, notes = read_stamps(folder / "usr/share/tuxpaint/stamps")
    if not stamps:
        raise ValueError(f"{PACKAGE} {version} holds no stamps where 2022.06.04-1 has them; its layout has changed")
    return rows_of(stamps, out, f"{PACKAGE} {version}", languages or TRANSLATED_LANGUAGES), notes


def read_stamps(root: Path) -> tuple[list[Stamp], dict[str, int]]:
    """All stamps with a PNG image and a text, in the order of their names, and what was left out."""
    notes: Counter[str] = Counter()
    stamps = []
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        files = set(names)
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix == ".svg" and stem + ".png" not in files and stem + ".txt" in files:
                notes["stamps that are SVG only"] += 1
            if suffix != ".png" or stem.endswith("_mirror"):
                continue
            if stem in _LEFT_OUT or stem + ".txt" not in files:
                notes["stamps without a text or a plain licence"] += 1
                continue
            stamps.append(_read_stamp(root, Path(folder), stem, files))
    return stamps, dict(notes)


def parse_texts(content: str) -> dict[str, str]:
    """Line 1 is English; then ``lang.utf8=text`` lines."""
    first, *rest = content.splitlines() or [""]
    texts = {"en": first.strip()}
    for line in rest:
        name, separator, text = line.partition("=")
        if separator and name.endswith(".utf8") and text.strip():
            texts.setdefault(slug(name.removesuffix(".utf8")), text.strip())
    return {language: text for language, text in texts.items() if text}


def rows_of(stamps: Sequence[Stamp], out: Path, source: str, languages: Sequence[str]) -> list[Row]:
    """The manifest's rows: all rows of a stamp share its group and split."""
    joining = dict.fromkeys((*TRANSLATED_LANGUAGES, *languages))
    groups = group_items(
        {stamp.key: _identity(stamp, joining) for stamp in track(stamps, "grouping", len(stamps), "stamps")}
    )
    rows: list[Row] = []
    for stamp in stamps:
        group = groups[stamp.key]
        shared = {
            "image": stamp.image.relative_to(out).as_posix(),
            "label": stamp.label,
            "group": group,
            "split": split_of(group, SPLIT_SALT),
            "source": source,
            "licence": "GPL-2",
            "attribution": "Tux Paint stamps, (c) 2002-2022 Bill Kendrick and contributors",
        }
        rows += _rows_of_stamp(stamp, out, shared, languages)
    return rows


def _rows_of_stamp(stamp: Stamp, out: Path, shared: dict[str, Any], languages: Sequence[str]) -> list[Row]:
    def row(subset: str, language: str, audio: Path | None = None, kind: str = "") -> Row:
        return Row(
            key=f"{stamp.key}-{subset}-{language}",
            text=stamp.texts[language],
            language=language,
            audio=audio.relative_to(out).as_posix() if audio else None,
            audio_kind=kind,
            subset=subset,
            **shared,
        )

    rows = [row("named", "en")]
    spoken = [language for language in sorted(stamp.speech) if language in stamp.texts]
    rows += [row("spoken", language, stamp.speech[language], "speech") for language in spoken]
    rows += [
        row("translated", language)
        for language in languages
        if language in stamp.texts and language not in spoken and language != "en"
    ]
    if stamp.name.startswith(_NAMES_SPOKEN):
        rows += [
            row("pronounced", language or "en", path, "speech")
            for language, path in sorted(stamp.effects.items())
            if (language or "en") in stamp.texts
        ]
    elif "" in stamp.effects:
        rows.append(row("effect", "en", stamp.effects[""], "effect"))
    return rows


def _read_stamp(root: Path, folder: Path, stem: str, files: set[str]) -> Stamp:
    texts = parse_texts((folder / f"{stem}.txt").read_text(encoding="utf-8", errors="replace"))
    speech: dict[str, Path] = {}
    effects: dict[str, Path] = {}
    for name in sorted(files):
        if not name.startswith(stem) or not name.endswith((".ogg", ".wav")):
            continue
        rest = name.removeprefix(stem).removesuffix(".ogg").removesuffix(".wav")
        if rest == "_desc" or rest.startswith("_desc_"):
            language = slug(rest.removeprefix("_desc").removeprefix("_")) or "en"
            speech.setdefault(language, folder / name)
        elif rest == "" or rest[0] == "_":
            effects.setdefault(slug(rest.removeprefix("_")), folder / name)
    effects = {language: path for language, path in effects.items() if language in ("", *texts)}
    return Stamp((folder / stem).relative_to(root).as_posix(), folder / f"{stem}.png", texts, speech, effects)


def _identity(stamp: Stamp, languages: Iterable[str]) -> list[str]:
    """What may not be shared across splits: the image, any audio, the name in any of ``languages``.

    The translations count because stamps with two English names often share one in another language.
    """
    files = [stamp.image, *stamp.speech.values(), *stamp.effects.values()]
    texts = [
        f"{language}:{normalise_text(stamp.texts[language])}" for language in languages if language in stamp.texts
    ]
    return texts + [file_token(path) for path in files]
