"""Contact sheets: a frame is at its patch or its seconds; text pieces are marked in context."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image

from mmmoe_pretrain.batch import Item, Sample, SampleMeta
from mmmoe_pretrain.evaluate.routing import page, sheets
from mmmoe_pretrain.evaluate.routing.top_tokens import TopToken
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.modalities.audio import Audio
from mmmoe_pretrain.modalities.audio_settings import AudioSettings
from mmmoe_pretrain.modalities.image import Image, ImageSettings
from mmmoe_pretrain.modalities.text import Text, TextSettings

VERMILION = np.array([0xD5, 0x5E, 0x00])


IMAGE = Image("image", ImageSettings(size=48, patch=8, stem="linear", positions="rotary"))


def top(modality: str, token: int, value: np.ndarray) -> TopToken:
    sample = Sample(SampleMeta("s"), (Item(modality, value),))
    return TopToken(np.log(0.5), modality, "pairs", sample, 0, token, "content")


def black_square(top: int, left: int, side: int) -> np.ndarray:
    """A white image of 48 pixels with a black square."""
    image = np.full((3, 48, 48), 255, dtype=np.uint8)
    image[:, top : top + side, left : left + side] = 0
    return image


def frame_of(sheet: np.ndarray, line: int, column: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The pixels inside of the vermilion frame and its white edge, within the cell."""
    left, top = sheets.cell_corner(line, column, size)
    width, height = size
    y, x = np.nonzero((sheet == VERMILION).all(-1))
    here = (abs(x - left - width / 2) < width / 2 + 6) & (abs(y - top - height / 2) < height / 2 + 6)
    x, y = x[here] - left, y[here] - top
    return x.min() + 4, y.min() + 4, x.max() - 3, y.max() - 3  # three lines, and a white one


def test_the_frame_is_drawn_around_the_patch() -> None:
    value = black_square(top=8, left=32, side=8)
    rows = [sheets.Row(0, 0.5, [top("image", 0, value)]),
            sheets.Row(3, 0.5, [top("image", 35, value), top("image", 10, value)])]  # fmt: skip
    (sheet,) = sheets.draw("title", IMAGE, rows)
    scale = sheets.SQUARE[0] / 48
    for line, column, box in ((0, 0, (0, 0, 8, 8)), (1, 0, (40, 40, 48, 48)), (1, 1, (32, 8, 40, 16))):
        x0, y0, x1, y1 = frame_of(sheet, line, column, sheets.SQUARE)
        np.testing.assert_allclose((x0, y0, x1, y1), np.array(box) * scale, atol=1.0)  # whole pixels
    left, upper = sheets.cell_corner(1, 1, sheets.SQUARE)
    assert sheet[upper + int(12 * scale), left + int(36 * scale)].max() < 40  # the black square is framed
    assert sheet[upper + int(30 * scale), left + int(12 * scale)].min() > 240


def test_the_frame_in_a_spectrogram_spans_its_token() -> None:
    mel = np.zeros((64, 160), dtype=np.float32)
    mel[:32, 64:96] = 1.0  # the third of five tokens is loud, in the low bands
    rows = [sheets.Row(0, 0.5, [top("audio", 2, mel)])]
    (sheet,) = sheets.draw("title", Audio("audio", AudioSettings(patch=32)), rows)
    width, height = sheets.WIDE
    x0, y0, x1, y1 = frame_of(sheet, 0, 0, sheets.WIDE)
    np.testing.assert_allclose((x0, y0, x1, y1), (0.4 * width, 0, 0.6 * width, height), atol=1.0)
    left, upper = sheets.cell_corner(0, 0, sheets.WIDE)
    assert sheet[upper + 3 * height // 4, left + width // 2].max() < 30  # loud is dark, low is below
    assert sheet[upper + height // 4, left + width // 2].min() > 225
    assert sheet[upper + 3 * height // 4, left + width // 5].min() > 225


def test_many_experts_go_to_several_sheets() -> None:
    rows = [sheets.Row(e, 0.01, [top("image", 0, black_square(0, 0, 8))]) for e in range(40)]
    rows[7] = sheets.Row(7, 0.0, [])  # nothing to show
    drawn = sheets.draw("title", IMAGE, rows)
    assert [round((s.shape[0] - sheets.HEADER) / 150) for s in drawn] == [16, 16, 7]
    assert sheets.draw("title", IMAGE, [rows[7]]) == []


def test_images_keep_their_aspect_up_to_two_to_one() -> None:
    sizes = ((60, 40), (40, 60), (300, 64), (10, 10))
    shown = [sheets.fitted(PIL.Image.new("RGB", size), (160, 80)) for size in sizes]
    assert shown == [(120, 80), (53, 80), (160, 80), (80, 80)]


class Pieces:
    """A vocabulary of five pieces and two marks."""

    bos_id, eos_id = 5, 6

    def piece(self, token_id: int) -> str:
        return ["▁a", "▁re", "d*", "▁", "dog", "<s>", "</s>"][token_id]

    def decode(self, ids: Any) -> str:
        return "".join(self.piece(i) for i in ids if i < 5).replace("▁", " ").strip()


TEXT: Modality = Text("text", TextSettings(), Pieces())  # type: ignore[arg-type]


def marked(place: int) -> str:
    return TEXT.caption(np.array([5, 0, 1, 2, 3, 4, 6]), place)


def test_a_piece_is_marked_in_its_sentence() -> None:
    assert marked(1) == "**a** red\\* dog"
    assert marked(2) == "a **re**d\\* dog"  # the space stays outside of the mark
    assert marked(3) == "a re**d\\*** dog"
    assert marked(5) == "a red\\* **dog**"


def test_marks_and_spaces_have_names() -> None:
    assert marked(0) == "**⟨begin⟩** a red\\* dog"
    assert marked(4) == "a red\\* **␣**dog"
    assert marked(6) == "a red\\* dog**⟨end⟩**"


def test_a_long_text_is_cut_around_its_piece() -> None:
    text = TEXT.caption(np.array([5] + [4] * 80 + [6]), 40)
    assert text == "…" + "dog" * 16 + "**dog**" + "dog" * 16 + "…"


def test_a_page_lists_what_modalities_say_of_their_tokens() -> None:
    """Texts are not drawn; what is empty in every row is not a column."""
    sample = Sample(SampleMeta("a_1", language="en"), (Item("image", black_square(0, 0, 8)),
                    Item("text", np.array([5, 4, 6]), "a | dog")))  # fmt: skip
    found = {
        name: [TopToken(np.log(0.5), name, "pairs", sample, i, 1, name)] for i, name in enumerate(("image", "text"))
    }
    assert sheets.draw("title", TEXT, [sheets.Row(0, 1.0, found["text"])]) == []
    layer = {"layer": 1, "free_experts": {}, "share": {"image": [1.0], "text": [1.0]}}
    text = page.layer_page(layer, [found], {"image": ["a.png"], "text": []}, {"image": IMAGE, "text": TEXT})
    assert "|  | token of image | text of the sample | language | task | sample |" in text
    assert "| 50% | pixels \\[8, 0, 16, 8\\] | a \\| dog | en | pairs | a\\_1 |" in text
    assert "|  | token of text | language | task | sample |" in text
    assert "| 50% | **dog** | en | pairs | a\\_1 |" in text
    assert text.count("![") == 1
