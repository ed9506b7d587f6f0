"""Which layers and which top-activating tokens the page has room for.

The best token of every expert comes before the second of any. Each image and sound is in the page once, whatever the
number of its tokens. What does not fit is counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mmmoe_pretrain.evaluate.features import text_of
from mmmoe_pretrain.evaluate.routing import page, token_html
from mmmoe_pretrain.evaluate.routing.html import rounded
from mmmoe_pretrain.evaluate.routing.media import Media
from mmmoe_pretrain.evaluate.routing.top_tokens import TopToken, TopTokens
from mmmoe_pretrain.modalities import Modalities

log = logging.getLogger(__name__)
MAX_BYTES = 16 << 20  # a browser opens it at once, and it can be attached to a mail or an issue
SHARES = {"thumbnail": 0.35, "sound": 0.4}  # of the room for tokens: the rest is left for their texts and numbers
MADE = {"thumbnail": token_html.thumbnail, "sound": token_html.clip}  # what stands in the page for each
RARE = 0.1  # of an even share of a modality: an expert with less is not shown with tokens of it
MAX_LETTERS = 300  # of a text in the JSON
HEADING = 400  # bytes around the first token of an expert and modality, with room to spare
TOKEN = 2000  # bytes that an image or a sound leaves for its first token


def fill(
    report: dict[str, Any], search: TopTokens, media: Media, modalities: Modalities, most: int = MAX_BYTES
) -> str:
    """Put into ``report`` what a page of ``most`` bytes has room for; returns the page."""
    layers = report["layers"]
    html, step = _with_layers(report, 1), 1
    while len(html.encode()) > most / 2 and step < len(layers):
        step *= 2
        html = _with_layers(report, step)
    room, bytes_left = most - len(html.encode()), 0
    while True:
        _Choice(report, media, modalities, max(0, room)).take(_by_rank(layers, search))
        html = page.render(report)
        bytes_left = most - len(html.encode())
        if bytes_left >= 0 or room <= 0:
            break
        room += bytes_left  # what stands around the tokens was larger than it counted
    log.info("%s", " ".join(page.left_out(report)) or f"the page has {len(html.encode()):,} bytes")
    return html


def _with_layers(report: dict[str, Any], step: int) -> str:
    for number, layer in enumerate(report["layers"]):
        layer["shown"] = number % step == 0
        layer["top_tokens"] = [{} for _ in range(layer["experts"])]
    hidden = sum(not layer["shown"] for layer in report["layers"])
    report.update(media=[], left_out={"layers": hidden, "tokens": 0, "thumbnails": 0, "sounds": 0})
    return page.render(report)


def _by_rank(layers: Sequence[dict[str, Any]], search: TopTokens) -> Iterator[tuple[dict[str, Any], int, TopToken]]:
    """The tokens of all layers that are shown, with their expert: the best of each expert and modality first."""
    found = [
        (layer, expert, tokens)
        for layer in layers
        if layer["shown"]
        for expert in range(layer["experts"])
        for modality, tokens in search.of(layer["layer"], expert).items()
        if layer["share"][modality][expert] >= RARE / layer["experts"]
    ]
    for rank in range(search.top):
        for layer, expert, tokens in found:
            if rank < len(tokens):
                yield layer, expert, tokens[rank]


class _Choice:
    """Adds tokens and their media to a report until ``room`` bytes of the page are used."""

    def __init__(self, report: dict[str, Any], media: Media, modalities: Modalities, room: int) -> None:
        self._report, self._media, self._modalities, self._room = report, media, modalities, room
        self._used: Counter[str] = Counter()  # bytes, by "thumbnail", "sound" and "token"
        self._full: set[str] = set()
        self._numbers: dict[tuple[str, str], int | None] = {}  # of the media of each item that was looked at
        report["media"] = []
        report["left_out"] |= {"tokens": 0, "thumbnails": 0, "sounds": 0}
        for layer in report["layers"]:
            layer["top_tokens"] = [{} for _ in range(layer["experts"])]

    def take(self, tokens: Iterator[tuple[dict[str, Any], int, TopToken]]) -> None:
        """Add the first of ``tokens``, until one does not fit."""
        for layer, expert, top in tokens:
            its, media = layer["top_tokens"][expert], self._report["media"]
            if (name := (top.modality, top.content)) not in self._numbers:
                self._numbers[name] = self._add_media(top)
            entry = _token(top, self._modalities, self._numbers[name])
            cost = _size(token_html.token(entry, media)) + (0 if top.modality in its else HEADING)
            if self._used.total() + cost > self._room:
                self._report["left_out"]["tokens"] = 1 + sum(1 for _ in tokens)
                return
            its.setdefault(top.modality, []).append(entry)
            self._used["token"] += cost

    def _add_media(self, top: TopToken) -> int | None:
        """The number of the media of the token's item; None where it has none that fit."""
        media: dict[str, Any] = {
            "modality": top.modality, "sample": _cut(top.sample.meta.key), "thumbnail": None, "sound": None,
        }  # fmt: skip
        for kind, make in (("thumbnail", self._media.thumbnail(top)), ("sound", self._media.sound(top))):
            if make is None:
                continue
            if kind not in self._full:
                media[kind] = make()
                cost = _size(MADE[kind](0, media))
                room = min(SHARES[kind] * self._room - self._used[kind], self._room - self._used.total() - TOKEN)
                if cost <= room:
                    self._used[kind] += cost
                    continue
                media[kind] = None
                self._full.add(kind)  # those that follow are not made: of a large corpus that takes minutes
            self._report["left_out"][f"{kind}s"] += 1
        if media["thumbnail"] is None and media["sound"] is None:
            return None
        self._report["media"].append(media)
        return len(self._report["media"]) - 1


def _token(top: TopToken, modalities: Modalities, media: int | None) -> dict[str, Any]:
    modality, value = modalities[top.modality], top.item.value
    drawn, excerpt = modality.draw(value, top.token), modality.excerpt(value, top.token)
    position = {name: _cut(its) for name, its in modality.describe(value, top.token).items()}
    return rounded({
        "sample": _cut(top.sample.meta.key), "item": top.number, "token": top.token, "task": top.task,
        "probability": top.probability, "log_probability": top.log_p,
        "language": _cut(top.sample.meta.language), "sample_text": "" if excerpt else _cut(text_of(top.sample)),
        "position": position, "excerpt": excerpt and [_cut(part) for part in excerpt],
        "media": media, "box": None if drawn is None else drawn[1],
    })  # fmt: skip


def _cut(value: Any) -> Any:
    return value[:MAX_LETTERS] + "…" if isinstance(value, str) and len(value) > MAX_LETTERS else value


def _size(html: str) -> int:
    return len(html.encode())
