"""The page of the routing report as a person sees it: in headless Chromium (``make page-check``)."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mmmoe_pretrain.evaluate.routing import page
from tests.browser import NAMES, Browser, chromium
from tests.evaluate.routing_values import report_of
from tests.evaluate.test_routing_page import HOSTILE

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not any(map(shutil.which, NAMES)), reason="needs Chromium: apt-get install chromium"),
]
VERMILION = np.array([0xD5, 0x5E, 0x00])
CELLS = "[...document.querySelectorAll('#load-1 tbody tr')].map(row => row.cells[COLUMN].textContent)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def tab(browser: Browser) -> Iterator[Browser]:
    """Each test leaves no problem."""
    browser.problems.clear()
    yield browser
    assert browser.problems == []


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("page"), report_of())


def written(folder: Path, report: dict[str, Any]) -> Path:
    (folder / "routing.html").write_text(page.render(report), encoding="utf-8")
    return folder / "routing.html"


def column(tab: Browser, number: int) -> list[str]:
    return tab.run(CELLS.replace("COLUMN", str(number)))


def screenshot(tab: Browser, selector: str) -> np.ndarray:
    """The pixels of an element."""
    tab.run(f"document.querySelector('{selector}').scrollIntoView({{block: 'center'}})")
    x, y, width, height = tab.run(f"(b => [b.x, b.y, b.width, b.height].map(Math.round))"
                                  f"(document.querySelector('{selector}').getBoundingClientRect())")  # fmt: skip
    whole = PIL.Image.open(io.BytesIO(base64.b64decode(tab.send("Page.captureScreenshot")["data"])))
    return np.asarray(whole.convert("RGB").crop((x, y, x + width, y + height))).astype(int)


def test_it_shows_layers_experts_tokens_and_lines(tab: Browser, path: Path) -> None:
    tab.open(path)
    assert tab.run("document.title") == "Routing of word, step 1200"
    assert tab.run("document.querySelectorAll('details').length") == 2
    assert tab.run("document.querySelectorAll('details[open]').length") == 1
    assert column(tab, 0) == ["0", "1", "2", "3"]
    assert column(tab, 1) == ["70%", "20%", "10%", "0%"]
    assert tab.run("document.querySelectorAll('svg.shot').length") == 2 * 3
    assert tab.run("document.querySelector('mark').textContent") == "word"
    assert tab.run("document.querySelectorAll('figure.chart').length") == 1 + 2 * 2
    assert tab.run("[...document.querySelectorAll('[role=img], audio, input')].every("
                   "it => it.ariaLabel || it.labels?.length || it.ariaValueText)")  # fmt: skip


def test_a_patch_is_framed_where_it_is(tab: Browser, path: Path) -> None:
    """104 pixels for 48: the black patch at 32 to 40, 8 to 16 is dark, and around it is a white line of 1.5 pixels, a
    vermilion one of 3, and a white one."""
    tab.open(path)
    assert tab.run("Promise.all([...document.querySelectorAll('defs image')].map(async it => {"
                   "const image = new Image(); image.src = it.getAttribute('href'); await image.decode();"
                   "return image.naturalWidth }))") == [48, 100]  # fmt: skip
    pixels = screenshot(tab, "svg.shot")
    scale = 104 / 48
    assert pixels[round(12 * scale), round(36 * scale)].max() < 40
    assert pixels[round(30 * scale), round(12 * scale)].min() > 230
    y, x = np.nonzero(np.abs(pixels - VERMILION).max(-1) < 30)
    outer = np.array([32, 8, 40, 16]) * scale + np.array([-4.5, -4.5, 4.5, 4.5])
    np.testing.assert_allclose((x.min(), y.min(), x.max() + 1, y.max() + 1), outer, atol=1.5)  # whole pixels


def test_headings_sort_from_the_keyboard(tab: Browser, path: Path) -> None:
    tab.open(path)
    tab.run("document.querySelectorAll('#load-1 th button')[2].focus()")
    tab.press("Enter")
    assert column(tab, 2) == ["95%", "5.0%", "0%", "0%"] and column(tab, 0) == ["3", "2", "0", "1"]
    tab.press(" ")
    assert column(tab, 2) == ["0%", "0%", "5.0%", "95%"]
    sorts = "[...document.querySelectorAll('#load-1 thead th')].map(it => it.ariaSort)"
    assert tab.run(sorts) == [None, None, "ascending", None, None, None]
    tab.run("document.querySelectorAll('#load-1 th button')[0].click()")
    assert column(tab, 0) == ["3", "2", "1", "0"], "by number"


def test_the_slider_shows_the_steps_of_training(tab: Browser, path: Path) -> None:
    """Also after the table was sorted. At its left end: images go to expert 1, and there was no audio."""
    tab.open(path)
    tab.run("document.querySelectorAll('#load-1 th button')[0].click()")  # experts 3, 2, 1, 0
    tab.run("document.querySelector('input[type=range]').focus()")
    for _ in range(3):
        tab.press("ArrowLeft")
    assert column(tab, 1) == ["0%", "0%", "100%", "0%"]
    assert column(tab, 2) == ["–"] * 4
    assert tab.run("document.querySelector('output').textContent") == "a batch of step 10"
    tab.run("(it => { it.value = it.max; it.dispatchEvent(new Event('input')) })(document.querySelector('input'))")
    assert column(tab, 1) == ["0%", "10%", "20%", "70%"]


def test_sounds_play(tab: Browser, path: Path) -> None:
    """A second of 440 Hz; a token plays its own span."""
    tab.open(path)
    loaded = "new Promise(done => { it.onloadedmetadata = () => done(it.duration); it.preload = 'auto'; it.load() })"
    assert tab.run(f"(it => {loaded})(document.querySelector('audio'))") == pytest.approx(1.0, abs=0.01)
    tab.run("document.querySelector('a.play').click()")
    assert tab.run("document.querySelector('audio').currentTime") >= 0.25
    assert tab.run("location.hash") == "", "it plays in place"
    ended = "new Promise(done => it.paused ? done(it.currentTime) : it.onpause = () => done(it.currentTime))"
    assert 0.5 <= tab.run(f"(it => {ended})(document.querySelector('audio'))") <= 1.0


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_itself_never_scrolls_sideways(tab: Browser, path: Path, width: int, dark: bool) -> None:
    tab.open(path, width=width, dark=dark)
    tab.run("document.querySelectorAll('details').forEach(it => it.open = true)")
    assert tab.run("document.documentElement.scrollWidth") <= width
    background = tab.run("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")


def test_it_can_be_read_without_javascript(tab: Browser, path: Path) -> None:
    """The numbers, the images and the players are there, and no control that would do nothing."""
    tab.open(path, scripts=False)
    root = tab.send("DOM.getDocument")["root"]["nodeId"]
    count = {selector: len(tab.send("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"])
             for selector in ("#load-1 tbody tr", "audio[controls]", "svg.shot", "button", "input")}  # fmt: skip
    assert count == {"#load-1 tbody tr": 4, "audio[controls]": 1, "svg.shot": 6, "button": 0, "input": 0}


def test_a_link_opens_the_layer_that_it_names(tab: Browser, path: Path) -> None:
    tab.open(path)
    tab.run("document.querySelector('#layers a[href=\"#layer-3\"]').click()")
    assert tab.run("new Promise(done => setTimeout(() => done(document.querySelectorAll('details')[1].open), 200))")


@pytest.mark.parametrize("word", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_texts_run_nothing_and_ask_for_nothing(tab: Browser, tmp_path: Path, word: str) -> None:
    tab.open(written(tmp_path, report_of(word)), width=400)
    assert tab.run("document.querySelectorAll('details').length") == 2
    assert tab.run("document.querySelectorAll('iframe, img').length") == 0
    assert tab.run("document.querySelectorAll('th button').length") > 0, "the script of the page ran"
    tab.run("document.querySelectorAll('details').forEach(it => it.open = true)")
    assert tab.run("document.documentElement.scrollWidth") <= 400
