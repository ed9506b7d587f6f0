"""Contact sheets: a frame stands where its patch or its sound is; text pieces are marked in context."""

from __future__ import annotations

import io

import numpy as np
import soundfile
import torch

from mmmoe_pretrain.batch import Sample, SampleMeta
from mmmoe_pretrain.config import AudioConfig, ImageConfig, ModalitiesConfig
from mmmoe_pretrain.evaluate.routing import page, sheets
from mmmoe_pretrain.evaluate.routing.favourites import Favourite
from mmmoe_pretrain.modalities import AudioCodec, ImageEmbedder

VERMILION = np.array([0xD5, 0x5E, 0x00])


def favourite(modality: str, place: int, sample: Sample) -> Favourite:
    return Favourite(np.log(0.5), modality, "contrastive", place, "content", sample)


def black_square(top: int, left: int, side: int) -> Sample:
    """A white picture of 48 pixels with a black square."""
    image = np.full((3, 48, 48), 255, dtype=np.uint8)
    image[:, top : top + side, left : left + side] = 0
    return Sample(SampleMeta("square"), image=image)


def frame_of(sheet: np.ndarray, line: int, column: int, modality: str) -> tuple[int, int, int, int]:
    """The pixels inside of the vermilion frame and its white edge, within the cell."""
    left, top = sheets.cell_corner(line, column, modality)
    width, height = sheets.CELLS[modality]
    y, x = np.nonzero((sheet == VERMILION).all(-1))
    here = (abs(x - left - width / 2) < width / 2 + 6) & (abs(y - top - height / 2) < height / 2 + 6)
    x, y = x[here] - left, y[here] - top
    return x.min() + 4, y.min() + 4, x.max() - 3, y.max() - 3  # three lines, and a white one


def test_the_box_of_a_patch_holds_what_its_token_is_made_of() -> None:
    config = ImageConfig(size=48, patch=8, stem="linear", positions="rotary")
    sample = black_square(top=8, left=32, side=8)  # second row, fifth of six columns
    assert sample.image is not None
    tokens = ImageEmbedder(config, 16)(torch.from_numpy(sample.image)[None]).detach()
    differs = [i for i in range(36) if not torch.allclose(tokens[i], tokens[0], atol=1e-4)]
    assert differs == [10]
    assert sheets.patch_box(10, config) == (32, 8, 40, 16)


def test_the_frame_is_drawn_around_the_patch() -> None:
    config = ModalitiesConfig(image=ImageConfig(size=48, patch=8))
    sample = black_square(top=8, left=32, side=8)
    rows = [sheets.Row(0, 0.5, [favourite("image", 0, sample)]),
            sheets.Row(3, 0.5, [favourite("image", 35, sample), favourite("image", 10, sample)])]  # fmt: skip
    (sheet,) = sheets.draw("title", "image", rows, config)
    scale = sheets.CELLS["image"][0] / 48
    for line, column, box in ((0, 0, (0, 0, 8, 8)), (1, 0, (40, 40, 48, 48)), (1, 1, (32, 8, 40, 16))):
        x0, y0, x1, y1 = frame_of(sheet, line, column, "image")
        np.testing.assert_allclose((x0, y0, x1, y1), np.array(box) * scale, atol=1.0)  # whole pixels
    left, top = sheets.cell_corner(1, 1, "image")
    assert sheet[top + int(12 * scale), left + int(36 * scale)].max() < 40  # the black square is framed
    assert sheet[top + int(30 * scale), left + int(12 * scale)].min() > 240


def test_a_click_is_in_the_token_of_its_seconds() -> None:
    """Noise, so that nothing is trimmed, and a loud click after 0.7 s."""
    config = AudioConfig(sample_rate=8_000, hop_length=100, patch=4, n_fft=256, n_mels=16)
    wave = 0.02 * np.random.default_rng(0).normal(size=12_000)
    wave[5_600:5_608] = 0.9
    file = io.BytesIO()
    soundfile.write(file, wave, 8_000, format="WAV")
    mel = AudioCodec(config).decode(file.getvalue())
    token = int(mel.mean(0).argmax()) // config.patch
    start, end = sheets.seconds(token, config)
    assert (round(start, 6), round(end, 6)) == (0.7, 0.75)  # 14 tokens of four frames of 12.5 ms before it


def test_the_frame_of_a_sound_spans_its_token() -> None:
    config = ModalitiesConfig(audio=AudioConfig(patch=8))
    mel = np.zeros((64, 40), dtype=np.float32)
    mel[:32, 16:24] = 1.0  # the third of five tokens is loud, in the low bands
    rows = [sheets.Row(0, 0.5, [favourite("audio", 2, Sample(SampleMeta("loud"), audio=mel))])]
    (sheet,) = sheets.draw("title", "audio", rows, config)
    width, height = sheets.CELLS["audio"]
    x0, y0, x1, y1 = frame_of(sheet, 0, 0, "audio")
    np.testing.assert_allclose((x0, y0, x1, y1), (0.4 * width, 0, 0.6 * width, height), atol=1.0)
    left, top = sheets.cell_corner(0, 0, "audio")
    assert sheet[top + 3 * height // 4, left + width // 2].max() < 30  # loud is dark, low is below
    assert sheet[top + height // 4, left + width // 2].min() > 225
    assert sheet[top + 3 * height // 4, left + width // 5].min() > 225


def test_many_experts_go_to_several_sheets() -> None:
    rows = [sheets.Row(e, 0.01, [favourite("image", 0, black_square(0, 0, 8))]) for e in range(40)]
    rows[7] = sheets.Row(7, 0.0, [])  # nothing to show
    drawn = sheets.draw("title", "image", rows, ModalitiesConfig())
    assert [round((s.shape[0] - sheets.HEADER) / 150) for s in drawn] == [16, 16, 7]
    assert sheets.draw("title", "image", [rows[7]], ModalitiesConfig()) == []


class Pieces:
    """A vocabulary of five pieces."""

    def piece(self, token_id: int) -> str:
        return ["▁a", "▁re", "d*", "▁", "dog"][token_id]


def marked(place: int) -> str:
    sample = Sample(SampleMeta("s"), text=np.array([0, 1, 2, 3, 4]), raw_text="a red* dog")
    return page.marked(favourite("text", place, sample), Pieces())  # type: ignore[arg-type]


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
    sample = Sample(SampleMeta("s"), text=np.array([4] * 80))
    text = page.marked(favourite("text", 40, sample), Pieces())  # type: ignore[arg-type]
    assert text == "…" + "dog" * 16 + "**dog**" + "dog" * 16 + "…"
