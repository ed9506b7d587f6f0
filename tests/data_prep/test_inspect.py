"""``mmmoe-data inspect``: hostile data is harmless, pages are bounded, and the same seed shows the same."""

from __future__ import annotations

import html.parser
import io
import json
import re

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmmoe_pretrain.data_prep.console import Interrupted
from mmmoe_pretrain.data_prep.inspect.command import Output, run
from mmmoe_pretrain.data_prep.inspect.histogram import Histogram
from mmmoe_pretrain.data_prep.inspect.measure import measure
from mmmoe_pretrain.data_prep.inspect.sheet import write_sheet
from mmmoe_pretrain.data_prep.rows.manifest import write_manifest
from mmmoe_pretrain.data_prep.rows.row import Row
from mmmoe_pretrain.data_prep.samples import Piece, Sample
from mmmoe_pretrain.data_prep.shards.shard import ShardOptions, shard_rows
from tests.data.servers import http_server
from tests.support import write_tar

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(2)'>",
    "</pre></style></title><b>",
    "\u202egnp.exe",
    "\x1b[31mred",
)
SAFE_TAGS = {
    "html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "table", "tr", "th", "td", "div", "p",
    "small", "svg", "rect", "article", "bdi", "details", "summary", "pre", "img", "br", "audio",
}  # fmt: skip


class Page(html.parser.HTMLParser):
    """The tags of a page, their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def image(colour="red", size=(40, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def sound(seconds: float) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(int(8000 * seconds)) / 9), 8000, format="WAV")
    return buffer.getvalue()


def test_bins_are_powers_of_two_and_hold_every_value():
    found = Histogram()
    for value in (0, 1, 2, 3, 8, 15.9, 10**300):
        found.add(value)
    assert found.bins()[:5] == [(0, 0, 1), (1, 2, 1), (2, 4, 2), (4, 8, 0), (8, 16, 2)]
    assert sum(count for *_, count in found.bins()) == found.count == 7


def test_a_page_escapes_all_that_data_holds_and_runs_and_loads_nothing(tmp_path, capsys):
    members = []
    for number, text in enumerate(HOSTILE):
        key = re.sub(r"[/.]", "_", text)
        fields = {"subset": text, "language": text, "label": text, text: text, "split": text}
        members += [(f"{key}.json", json.dumps(fields).encode()), (f"{key}.txt", text.encode())]
        members += [(f"{key}.png", image() if number else b"<script>")]
    write_tar(tmp_path / "<b>" / "0.tar", members)
    run(str(tmp_path / "<b>"), Output(tmp_path / "page.html", tmp_path / "sheet.png"))
    assert "\x1b[31mred" not in (said := capsys.readouterr().out) and "\u202e" not in said
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert set(page.tags) <= SAFE_TAGS
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("href", "style")]
    assert all(value.startswith("data:image/jpeg;base64,") for name, value in page.attributes if name == "src")
    [policy] = [value for name, value in page.attributes if value and "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:; media-src data:; style-src 'sha256-")
    assert all(hostile in page.text for hostile in HOSTILE)
    assert page.tags.count("article") == len(HOSTILE)
    assert page.tags.count("img") == len(HOSTILE) - 1  # one is damaged


def test_a_document_is_shown_in_its_order_and_sounds_are_cut(tmp_path):
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / "a.wav").write_bytes(sound(12))
    (tmp_path / "b.txt").write_text("from a file", encoding="utf-8")
    parts = [{"text": "first"}, {"image": "a.png"}, {"text": "second"}, {"audio": "a.wav"}, {"file": "b.txt"}]
    far = Row("url", image="https://example.invalid/x.png", text="far")
    rows = [Row("tale", parts=parts), far, Row("lost", parts=[{"file": "lost.txt"}])]
    write_manifest(tmp_path / "manifest.jsonl", rows)
    run(str(tmp_path), Output(tmp_path / "page.html", tmp_path / "sheet.png"))
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    article = text[text.index("<article class=document>") :]
    order = ["first", "<img", "40 x 20", "second", "<audio controls", "12.00 s, of which 10 are here", "from a file"]
    assert [article.index(part) for part in order] == sorted(article.index(part) for part in order)
    assert len(article) < 200_000  # 12 s of WAV have 192,000 bytes, 256,000 in base64
    assert "not fetched to look at it" in text
    assert "lost.txt cannot be read" in text


def test_the_page_is_bounded_and_the_same_seed_shows_the_same_samples(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    write_manifest(tmp_path / "manifest.jsonl", [Row(f"k{n}", image=f"{n}.png") for n in range(30)])
    pages = []
    for name, seed, most in (("one", 3, 10**6), ("two", 3, 10**6), ("three", 4, 10**6), ("small", 3, 20_000)):
        run(str(tmp_path), Output(tmp_path / f"{name}.html", None, 10, seed, most, as_json=True))
        pages.append((tmp_path / f"{name}.html").read_text(encoding="utf-8"))
        answer = json.loads(capsys.readouterr().out)["html"]
        assert answer["samples"] + answer["left_out"] == 10
    assert pages[0] == pages[1] != pages[2]
    assert len(pages[3]) <= 20_000
    assert 0 < pages[3].count("<article") < 10
    assert f"; {10 - pages[3].count('<article')} more did not fit" in pages[3]


@pytest.mark.parametrize("remote", [False, True])
def test_records_beside_shards_are_counted_with_the_reasons(tmp_path, capsys, remote):
    (tmp_path / "0.png").write_bytes(image())
    (tmp_path / "1.png").write_bytes(b"no image")
    rows = [Row(f"k{n}", image=f"{n}.png") for n in range(2)]
    shard_rows(rows, tmp_path, tmp_path / "out", ShardOptions(workers=1, max_bad_fraction=1))
    with http_server(tmp_path) as server:
        run(f"{server.url}/out/train" if remote else str(tmp_path / "out"), Output(as_json=True))
    answer = json.loads(capsys.readouterr().out)
    assert (answer["rows"], answer["records"]["statuses"]) == (1, {"ok": 1, "broken": 1})
    [reason] = answer["records"]["reasons"]
    assert "1.png is not a readable image" in reason
    assert answer["histograms"]["width"] == {"count": 1, "least": 40, "mean": 40, "most": 40, "bins": [[32, 64, 1]]}


def test_kinds_are_bounded_and_what_cannot_be_opened_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mmmoe_pretrain.data_prep.inspect.measure.MOST_KINDS", 2)
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    rows = [Row(f"k{n}", text="x", language=f"l{n}") for n in range(9)]
    write_manifest(tmp_path / "manifest.jsonl", [*rows, Row("bad", audio="a.wav"), Row("none", image="b.png")])
    found = measure(tmp_path)
    assert len(found.totals) == 3
    assert found.whole.rows == 11
    assert found.problem_count == 2
    assert "line 10 bad: audio a.wav cannot be opened" in found.problems[0]


def test_a_damaged_sample_is_counted_once_by_headers_or_where_it_is_decoded(tmp_path):
    members = {"a.png": image(), "b.png": image()[:60], "c.png": b"no", "c.wav": b"no", "c.txt": b"red"}
    write_tar(tmp_path / "0.tar", members.items())
    named = [f"{tmp_path}/0.tar c: image png cannot be opened", f"{tmp_path}/0.tar b: image cannot be decoded"]
    for samples, damaged in ((0, 1), (3, 2)):
        found = measure(tmp_path, samples)
        rows = {kind.modalities: total.rows for kind, total in found.totals.items()}
        assert rows == {"image": 3 - damaged, "(damaged)": damaged}
        assert (found.problem_count, found.decoded) == (damaged, samples)
        assert all(map(str.startswith, found.problems, named[:damaged]))
        assert sum(total.bytes for total in found.totals.values()) == sum(map(len, members.values()))


def test_captions_stay_in_their_column_and_tell_letters_without_a_font(tmp_path, monkeypatch):
    monkeypatch.setattr("mmmoe_pretrain.data_prep.inspect.sheet.FONTS", ())

    def drawn(key: str, text: str) -> np.ndarray:
        samples = [Sample("", key, "", {}, (Piece("text", "", text),))] * 2
        write_sheet(tmp_path / "sheet.png", samples)
        return np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))

    sheet = drawn("W" * 99, "W" * 999)
    for gap in (0, 6 + 128, 2 * (6 + 128)):
        assert (sheet[:, gap : gap + 6] == 255).all()
    assert (drawn("a", "\u65e5\u672c \u8a9e: \u0430") == drawn("a", "(no font) : \u0430")).all()


@pytest.mark.parametrize("output", [Output(html="x.txt"), Output(sheet="x.html")])
def test_a_file_of_another_kind_is_never_overwritten(tmp_path, output):
    output = Output(output.html and tmp_path / output.html, output.sheet and tmp_path / output.sheet)
    with pytest.raises(ValueError, match="is not a file whose name ends with"):
        run(str(tmp_path), output)


def test_an_interrupted_page_leaves_the_earlier_one(tmp_path, monkeypatch):
    def interrupt(_):
        raise Interrupted

    write_manifest(tmp_path / "manifest.jsonl", [Row("a", text="red")])
    (tmp_path / "page.html").write_text("earlier")
    monkeypatch.setattr("mmmoe_pretrain.data_prep.inspect.page._article", interrupt)
    with pytest.raises(Interrupted):
        run(str(tmp_path), Output(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.jsonl", "page.html"]
