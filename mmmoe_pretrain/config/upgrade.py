"""Converts configs of earlier versions to the current format: ``mmmoe config upgrade FILE``.

Before there were kinds, a config had three fixed modalities, a contrastive and a captioning objective, and settings
of modalities stood in ``data``. Earlier constants are written as settings.
"""

from __future__ import annotations

import copy
from typing import Any

OLD_MODALITIES = ("image", "audio", "text")
OLD_TASKS = ("contrastive", "captioning")
OLD_PAIRS = {"image-text": 1.0, "audio-text": 1.0, "image-audio": 0.5}
PIXELS = {"mean": 0.7, "std": 0.35}  # constants of earlier versions
SCORED = {"by": {"audio": "audio_kind"}, "within": "language"}  # and how they were scored
MOVED = {  # of ``data``: to a modality's setting
    "image_augment": ("image", "augment"),
    "image_flip": ("image", "flip"),
    "audio_augment": ("audio", "augment"),
    "text_dropout": ("text", "dropout"),
}


def needs_upgrade(values: dict[str, Any]) -> bool:
    """Are these the values of a config of an earlier version, in which nothing had a kind?"""
    sections = [values.get(name) or {} for name in ("modalities", "objectives")]
    entries = [its for section in sections if isinstance(section, dict) for its in section.values()]
    return not any(isinstance(its, dict) and "kind" in its for its in entries)


def upgraded(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` in the current format; unchanged if they are already. Raises ValueError for an invalid section."""
    if not needs_upgrade(values):
        return values
    new = copy.deepcopy(values)
    data, evaluate, old = (_section(new, name) for name in ("data", "evaluate", "modalities"))
    for section, known in (("modalities", OLD_MODALITIES), ("objectives", OLD_TASKS)):
        if unknown := _section(new, section).keys() - set(known):
            raise ValueError(
                f"{section} has {', '.join(map(str, sorted(unknown, key=str)))} without a kind; earlier versions had "
                f"{', '.join(known)}. Correct the name, or give the entry a kind"
            )
    modalities = {name: {"kind": name, **_section(old, name)} for name in OLD_MODALITIES}
    modalities["image"] = {**modalities["image"], **PIXELS}
    for key, (name, setting) in MOVED.items():
        if key in data:
            modalities[name][setting] = data.pop(key)
    if share := data.pop("label_text", 0):
        modalities["text"] |= {"label_probability": share, "label_with": ["image"]}
    if rows := evaluate.pop("image_rows", None):
        evaluate["rows"] = {"image-text": rows}
    if (least := evaluate.pop("min_clips_per_language", None)) is not None:
        evaluate["min_items"] = least
    new["evaluate"] = {**evaluate, **SCORED}
    moved = {"modalities": modalities, "objectives": _objectives(_section(new, "objectives"))}
    return {**{key: value for key, value in new.items() if key not in moved}, **moved}


def _objectives(old: dict[str, Any]) -> dict[str, Any]:
    contrastive = {"pairs": OLD_PAIRS, **_section(old, "contrastive")}
    captioning = {"weight": 0.0, "fraction": 0.25, "prefixes": ["image", "audio"], **_section(old, "captioning")}
    new: dict[str, Any] = {}
    if contrastive["pairs"]:
        new["contrastive"] = {"kind": "contrastive", **contrastive}
    if captioning["prefixes"]:
        parts = {"parts": [captioning.pop("prefixes"), "text"]}
        new["captioning"] = {"kind": "next_token", **parts, **captioning}
    return new


def _section(values: dict[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds {type(found).__name__}, not a mapping of settings; correct the config")
    return found
