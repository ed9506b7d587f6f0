"""A page has a size: what it has room for, in which order, and that the rest is counted."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.evaluate.routing import page, selection
from mmmoe_pretrain.evaluate.routing.media import Media, thumbnail_of
from mmmoe_pretrain.evaluate.routing.top_tokens import TopToken, TopTokens
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.modalities.image import Image, ImageSettings
from tests.evaluate.routing_values import report_of

EXPERTS, TOP = 4, 8
MODALITIES = Modalities({"image": Image("image", ImageSettings(size=16, patch=8))})


@dataclass
class Search(TopTokens):
    """Every expert of every layer has ``TOP`` tokens in as many images, of ``images`` different ones in all."""

    images: int
    top: int = TOP

    def of(self, layer: int, expert: int) -> dict[str, list[TopToken]]:
        found = [(TOP * (EXPERTS * layer + expert) + rank) % self.images for rank in range(TOP)]
        return {"image": [self._token(number, rank) for rank, number in enumerate(found)]}

    def _token(self, number: int, rank: int) -> TopToken:
        pixels = np.random.default_rng(number).integers(0, 256, (3, 16, 16), dtype=np.uint8)
        sample = Sample(SampleMeta(f"sample-{number}"), (Item("image", pixels),))
        return TopToken(-0.1 * (rank + 1), "image", "pairs", sample, 0, number % 4, str(number))


class Drawn(Media):
    """Without rows to read sounds from."""

    def __init__(self) -> None: ...

    def thumbnail(self, top: TopToken) -> Callable[[], dict[str, Any]]:
        drawn = MODALITIES["image"].draw(top.item.value, top.token)
        assert drawn is not None
        return functools.partial(thumbnail_of, drawn[0])

    def sound(self, top: TopToken) -> None:
        return None


def filled(layers: int, most: int, images: int = 10_000) -> tuple[dict[str, Any], str]:
    report = report_of(layers=layers)
    del report["media"], report["left_out"]
    for layer in report["layers"]:
        layer["share"]["image"] = [0.5, 0.3, 0.19, 0.01]  # an even share is 0.25: the last expert is not shown
    html = selection.fill(report, Search(images), Drawn(), MODALITIES, most)
    return report, html


def listed(report: dict[str, Any]) -> list[list[int]]:
    return [[len(found.get("image", [])) for found in layer["top_tokens"]] for layer in report["layers"]]


def test_all_is_shown_where_there_is_room() -> None:
    report, html = filled(layers=2, most=1 << 20)
    assert listed(report) == [[TOP, TOP, TOP, 0]] * 2
    assert report["left_out"] == {"layers": 0, "tokens": 0, "thumbnails": 0, "sounds": 0}
    assert html == page.render(json.loads(json.dumps(report)))


def test_the_best_token_of_every_expert_comes_before_the_second_of_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selection.SHARES, "thumbnail", 1.0)
    everything = len(filled(layers=2, most=1 << 20)[1])
    report, html = filled(layers=2, most=everything - 20_000)
    counts = sorted(count for layer in listed(report) for count in layer[:3])
    assert counts[0] >= 1 and counts[-1] - counts[0] <= 1 and counts[0] < TOP
    assert report["left_out"]["tokens"] == 2 * 3 * TOP - sum(counts)
    assert f"{report['left_out']['tokens']} top-activating tokens" in html
    ranks = [[found["log_probability"] for found in its["image"]] for its in report["layers"][0]["top_tokens"][:3]]
    assert all(rank == pytest.approx([-0.1 * (i + 1) for i in range(len(rank))]) for rank in ranks)


@pytest.mark.parametrize("most", [45_000, 60_000, 100_000, 200_000])
def test_a_page_is_never_larger_than_it_may_be(most: int) -> None:
    """12 layers; the template with its style and script is a part of it."""
    report, html = filled(layers=12, most=most)
    assert len(html.encode()) <= most
    shown = [layer["shown"] for layer in report["layers"]]
    assert report["left_out"]["layers"] == shown.count(False)
    assert shown[0] and all(
        not any(found) for found, is_shown in zip(listed(report), shown, strict=True) if not is_shown
    )
    assert all(shown) == (most == 200_000)


def test_an_image_of_many_tokens_is_made_once() -> None:
    report, _ = filled(layers=2, most=1 << 20, images=3)
    assert len(report["media"]) == 3
    assert {found["media"] for layer in report["layers"] for its in layer["top_tokens"]
            for found in its.get("image", [])} == {0, 1, 2}  # fmt: skip


def test_images_take_no_more_than_their_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(selection.SHARES, "thumbnail", 0.01)
    report, html = filled(layers=2, most=200_000)
    assert listed(report) == [[TOP, TOP, TOP, 0]] * 2
    assert report["left_out"]["thumbnails"] > 0 and report["left_out"]["tokens"] == 0
    missing = [found for layer in report["layers"] for its in layer["top_tokens"] for found in its.get("image", [])
               if found["media"] is None]  # fmt: skip
    assert len(missing) == report["left_out"]["thumbnails"], "each of them is in an image of its own"
    assert f"{len(missing)} images" in html


def test_long_texts_are_cut_in_the_json() -> None:
    token = Search(1).of(0, 0)["image"][0]
    sample = Sample(SampleMeta("k" * 5000, language="l" * 5000), token.sample.items)
    long = TopToken(token.log_p, "image", "pairs", sample, 0, 0, "c")
    found = selection._token(long, MODALITIES, None)
    assert max(len(value) for value in found.values() if isinstance(value, str)) == selection.MAX_LETTERS + 1
