"""The page of the routing report: what hostile data cannot do, frames and lines by hand, and media."""

from __future__ import annotations

import base64
import hashlib
import html as escaping
import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import PIL.Image
import pytest
import soundfile

from mmmoe_pretrain.evaluate.routing import html, page, token_html
from mmmoe_pretrain.evaluate.routing.media import ASPECT, SIDE, sound_of, thumbnail_of
from tests.evaluate.routing_values import report_of

HOSTILE = [
    "</script><script>alert(1)</script>",
    "</style></title></svg><img src=x onerror=alert(1)>",
    "\"><iframe src='https://example.org'></iframe>",
    "' onmouseover='alert(1)",
    "<!-- --> ]]> &lt;b&gt; &amp",
    "$policy ${title} $$ %s {0}",
    "\x00\x07\x1b[31m\x7f\x85\ud800",
    "\u202egnp.exe\u2066 \u2069\u061c",
    "مرحبا \u200f שלום",
    "https://example.org/a.png",
    "x" * 3_000_000,
]


class Outline(HTMLParser):
    """The elements of a page with the names of their attributes, and the policy, styles and scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, tuple[str, ...]]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.content: dict[str, list[str]] = {"style": [], "script": []}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(name for name, _ in attrs)))
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.elements.append((f"/{tag}", ()))
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in self.content:
            self.content[self._inside].append(data)


@pytest.mark.parametrize("word", HOSTILE, ids=range(len(HOSTILE)))
def test_no_text_of_the_data_changes_the_elements_of_the_page(word: str) -> None:
    harmless, hostile = (page.render(report_of(it)) for it in ("word", word))
    assert Outline(hostile).elements == Outline(harmless).elements
    assert not html.HARMFUL.search(hostile)
    assert len(hostile) < len(harmless) + 40_000, "texts are cut"
    hostile.encode()  # no half of a character is left


def test_the_page_asks_for_nothing_and_runs_only_its_own_script() -> None:
    outline = Outline(page.render(report_of("https://example.org")))
    for tag, name, value in outline.attributes:
        assert name != "style" and not name.startswith("on"), (tag, name)
        if name in ("src", "href"):
            assert value.startswith(("#", "data:image/", "data:audio/")), (tag, name, value)
    policy = next(value for tag, name, value in outline.attributes if tag == "meta" and "default-src" in value)
    (style,), (_, script) = outline.content["style"], outline.content["script"]
    for kind, content in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:; ")


def test_an_image_is_in_the_page_once_and_each_token_has_its_frame() -> None:
    """48 pixels, shown on 104: the patch of 8 at column 4 of 6, row 1, and 3 pixels of the screen around it."""
    report = report_of()
    found = page.render(report)
    assert found.count(report["media"][0]["thumbnail"]["uri"]) == 1
    assert found.count(report["media"][1]["sound"]["uri"]) == 1
    framed = token_html.token(report["layers"][0]["top_tokens"][0]["image"][0], report["media"])
    (box,) = re.findall(r'<rect class="frame" x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"/>', framed)
    edge = 3 * 48 / 104
    np.testing.assert_allclose(
        [float(its) for its in box], (32 - edge, 8 - edge, 8 + 2 * edge, 8 + 2 * edge), atol=0.01
    )
    assert 'viewBox="0 0 48 48"' in framed and 'href="#image-0"' in framed
    assert 'aria-label="word, framed: pixels [32, 8, 40, 16]"' in framed


def test_words_are_marked_in_their_sentence_and_other_kinds_say_where_they_are() -> None:
    its = report_of("<dog>")["layers"][0]["top_tokens"]
    assert "<bdi>a <mark>&lt;dog&gt;</mark> dog</bdi>" in token_html.token(its[0]["text"][0], [])
    assert "<bdi>&lt;dog&gt; [1, 2]</bdi>" in token_html.token(its[1]["text"][0], [])
    played = token_html.token(its[3]["audio"][0], report_of()["media"])
    assert '<a class="play" href="#clip-1" data-from="0.25" data-to="0.5">' in played
    late = {**its[3]["audio"][0], "position": {"seconds": [1.25, 1.5]}}  # of a second
    assert "play" not in token_html.token(late, report_of()["media"])


def test_what_is_left_out_is_said() -> None:
    report = report_of()
    assert page.left_out(report) == ["Left out, so that this page stays small: 7 top-activating tokens. "
                                     "routing.json has the numbers of all layers."]  # fmt: skip
    assert escaping.escape(page.left_out(report)[0]) in page.render(report)
    report["left_out"]["tokens"] = 0
    assert page.left_out(report) == []


def test_the_slider_has_the_loads_of_each_step_by_column() -> None:
    """Column 0 of the table is the expert. A record without audio has null."""
    text = Outline(page.render(report_of(layers=1))).content["script"][0]
    (layer,) = json.loads(text)
    assert (layer["layer"], layer["columns"], layer["steps"]) == (1, [1, 2, 3], [10, 20, 30])
    assert layer["load"][0] == [[0, 10_000, 0, 0], [None] * 4, [1000, 4000, 5000, 0]]
    assert layer["load"][2][1] == [0, 0, 500, 9500]


def test_json_of_another_version_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="has version 2, and this page is made of version 1; write it again"):
        page.render({**report_of(), "version": 2})


def test_json_in_a_script_element_cannot_end_it() -> None:
    value = {"</script><!--": "\u2028&"}
    assert not set("<>&\u2028") & set(html.data(value))
    assert json.loads(html.data(value)) == value


def test_lines_are_scaled_and_broken_where_values_are_missing() -> None:
    """A chart of 320 x 110 with a margin of 6: 0 is at y = 104, the top at y = 6; 40 steps are its width."""
    drawn = html.chart("Change", [10, 20, 30, 50], [("a", "c0", [0.0, 1.0, None, 0.5])], 1.0)
    assert 'd="M0 104L80 6M320 55"' in drawn
    assert 'aria-label="Change, step 10 to 50: a 0% to 50%"' in drawn


@pytest.mark.parametrize(
    ("share", "shown"), [(None, "–"), (0.0, "0%"), (0.0004, "<0.1%"), (0.0123, "1.2%"), (0.126, "13%"), (1.0, "100%")]
)
def test_shares_are_shown_in_percent(share: float | None, shown: str) -> None:
    assert html.percent(share) == shown


def test_shades_end_at_the_largest_share() -> None:
    assert [html.level(share, 0.5) for share in (0.0, 0.049, 0.051, 0.26, 0.5, 0.9)] == [0, 0, 1, 5, 9, 9]
    assert html.level(0.0, 0.0) == 0


def decoded(uri: str) -> bytes:
    return base64.b64decode(uri.partition(",")[2])


@pytest.mark.parametrize(
    ("size", "shown"),
    [((16, 16), (16, 16)), ((300, 200), (SIDE, SIDE * 2 // 3)), ((1000, 64), (SIDE, SIDE // 2)), ((5, 50), (25, 50))],
)
def test_images_are_shrunk_and_no_longer_than_two_to_one(size: tuple[int, int], shown: tuple[int, int]) -> None:
    found = thumbnail_of(PIL.Image.new("RGB", size, (200, 30, 30)))
    assert ASPECT == 2
    assert (found["width"], found["height"]) == shown
    image = PIL.Image.open(io.BytesIO(decoded(found["uri"])))
    assert image.size == shown
    np.testing.assert_allclose(np.asarray(image)[0, 0], (200, 30, 30), atol=3)  # JPEG's rounding


def test_noise_becomes_jpeg_and_a_drawing_png() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert thumbnail_of(PIL.Image.fromarray(noise))["uri"].startswith("data:image/jpeg;base64,")
    assert thumbnail_of(PIL.Image.new("RGB", (64, 64)))["uri"].startswith("data:image/png;base64,")


def test_a_sound_comes_back_and_a_long_one_is_cut() -> None:
    wave = (0.5 * np.sin(np.arange(12 * 8000) / 9)).astype(np.float32)
    found: dict[str, Any] = sound_of(wave, 8000)
    heard, rate = soundfile.read(io.BytesIO(decoded(found["uri"])))
    assert (rate, len(heard), found["seconds"]) == (8000, 80_000, 10.0)
    np.testing.assert_allclose(heard, wave[:80_000], atol=2**-15)  # 16 bits
