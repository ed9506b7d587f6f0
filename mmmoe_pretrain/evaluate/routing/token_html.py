"""A top-activating token on the page of the routing report: framed in its image, marked in its sentence, with the
player of its sound. An image or a sound is in the page once, and all of its tokens refer to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from mmmoe_pretrain.evaluate.routing.html import attribute, percent, text

SHOT = 104  # pixels of a square image as it is shown
EDGE = 3.0  # pixels between the token and the middle of its frame, which hides nothing of it


def thumbnail(number: int, media: dict[str, Any]) -> str:
    """The definition of an image, to which all tokens in it refer."""
    its = media["thumbnail"]
    if its is None:
        return ""
    return (
        f'<image id="image-{number}" width="{int(its["width"])}" height="{int(its["height"])}" '
        f'href="{escape(its["uri"])}"/>\n'
    )


def clip(number: int, media: dict[str, Any]) -> str:
    """The player of a sound, to which all tokens in it refer."""
    its = media["sound"]
    if its is None:
        return ""
    name = f"{text(media['modality'], 40)} of {text(media['sample'], 80)}"
    return (
        f'<figure class="clip" id="clip-{number}"><audio controls preload="none" '
        f'aria-label="{attribute(media["modality"], 40)} of {attribute(media["sample"], 80)}" '
        f'src="{escape(its["uri"])}"></audio><figcaption><small>{name}, {its["seconds"]:.2f} s</small></figcaption>'
        f"</figure>\n"
    )


def token(found: dict[str, Any], media: Sequence[dict[str, Any]]) -> str:
    """One top-activating token: its image with a frame, its words in their sentence, or where it is in its item."""
    sound = found["media"] is not None and media[found["media"]]["sound"]
    shown = found["media"] is not None and media[found["media"]]["thumbnail"]
    where = "" if found["excerpt"] else ", ".join(f"{name} {its}" for name, its in found["position"].items())
    parts = [
        f"<b>{percent(found['probability'])}</b>",
        _play(found, sound["seconds"]) if sound else "",
        text(where) if where else "",
        *(text(found[name]) for name in ("sample_text", "language", "task", "sample") if found[name]),
    ]
    about = f"<small>{' · '.join(filter(None, parts))}</small>"
    if found["excerpt"]:
        before, word, after = (attribute(part) for part in found["excerpt"])
        return f'<li class="word"><bdi>{before}<mark>{word}</mark>{after}</bdi> {about}</li>\n'
    return f"<li>{_framed(found, shown, where) if shown else ''}{about}</li>\n"


def _play(found: dict[str, Any], seconds: float) -> str:
    """Plays the token's span, unless it lies in the part of a long sound that was cut."""
    start, end = found["position"].get("seconds", (0, seconds))
    if start >= seconds:
        return ""
    return (
        f'<a class="play" href="#clip-{found["media"]}" data-from="{float(start):.4g}" data-to="{float(end):.4g}">'
        f"play</a>"
    )


def _framed(found: dict[str, Any], shown: dict[str, Any], where: str) -> str:
    width, height = int(shown["width"]), int(shown["height"])
    scale = SHOT / max(min(width, height), max(width, height) / 1.5)
    left, top, right, bottom = (float(share) for share in found["box"])
    grow = EDGE / scale
    box = (
        f'x="{width * left - grow:.4g}" y="{height * top - grow:.4g}" '
        f'width="{width * (right - left) + 2 * grow:.4g}" height="{height * (bottom - top) + 2 * grow:.4g}"'
    )
    label = attribute(f"{found['sample']}, framed: {where}", 200)
    return (
        f'<svg class="shot" viewBox="0 0 {width} {height}" width="{width * scale:.4g}" height="{height * scale:.4g}" '
        f'role="img" aria-label="{label}"><use href="#image-{found["media"]}"/>'
        f'<rect class="under" {box}/><rect class="frame" {box}/></svg>'
    )
