"""Contact sheets: the patches and the stretches of sound that experts like best, each framed in its
picture or in its spectrogram.

A row an expert, its favourites from left to right. Owns the drawing, by Pillow: a sheet of a hundred
small pictures takes a tenth of a second. The frame is vermilion with a white edge, outside of what it
frames, so that it can be seen on any ground and by colour-blind readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmmoe_pretrain.batch import Sample
from mmmoe_pretrain.config import AudioConfig, ImageConfig, ModalitiesConfig
from mmmoe_pretrain.evaluate.routing.favourites import Favourite

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

ROWS = 16  # experts on a sheet; more go to further sheets
RARE = 0.1  # of an even share of the modality: an expert with less has no favourites worth a look
CELLS = {"image": (112, 112), "audio": (160, 80)}  # pixels: width and height of a picture, of a spectrogram
LABEL_WIDTH, HEADER, CAPTION, GAP = 104, 38, 26, 12
INK, QUIET, OUTLINE, FRAME, EDGE = "#222222", "#6B6B6B", "#DADADA", "#D55E00", "#FFFFFF"
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Row:
    """One expert's line: ``share`` is the expert's share of the modality's assignments."""

    expert: int
    share: float
    favourites: list[Favourite]


def patch_box(place: int, config: ImageConfig) -> Box:
    """Pixels of the square picture that patch ``place`` covers; patches run row by row."""
    row, column = divmod(place, config.size // config.patch)
    return (
        column * config.patch,
        row * config.patch,
        (column + 1) * config.patch,
        (row + 1) * config.patch,
    )


def seconds(place: int, config: AudioConfig) -> tuple[float, float]:
    """The stretch of the clip that sound token ``place`` covers, counted from where the clip begins once
    its silent ends are trimmed (``modalities/audio.py``): frame f stands at f hops."""
    token = config.patch * config.hop_length / config.sample_rate
    return place * token, (place + 1) * token


def worth_a_look(share: float, experts: int) -> bool:
    """The expert serves the modality more than by accident."""
    return share >= RARE / experts


def draw(title: str, modality: str, rows: Sequence[Row], config: ModalitiesConfig) -> list[np.ndarray]:
    """uint8 [height, width, 3] of each sheet; rows without favourites are left out."""
    rows = [row for row in rows if row.favourites]
    starts = range(0, len(rows), ROWS)
    return [_sheet(title, modality, rows[start : start + ROWS], config) for start in starts]


def cell_corner(line: int, column: int, modality: str) -> tuple[int, int]:
    """Where the picture in ``line`` and ``column`` of a sheet begins: left, top in pixels."""
    width, height = CELLS[modality]
    return LABEL_WIDTH + column * (width + GAP), HEADER + line * (height + CAPTION + GAP)


def _sheet(title: str, modality: str, rows: Sequence[Row], config: ModalitiesConfig) -> np.ndarray:
    from PIL import Image, ImageDraw

    columns = max(len(row.favourites) for row in rows)
    width, height = cell_corner(len(rows), columns, modality)
    sheet = Image.new("RGB", (max(width, 640), height), EDGE)
    pen = ImageDraw.Draw(sheet)
    _text(pen, (GAP, GAP), title, INK, 15)
    for line, row in enumerate(rows):
        top = cell_corner(line, 0, modality)[1] + CELLS[modality][1] // 2
        _text(pen, (GAP, top - 18), f"expert {row.expert}", INK, 15)
        _text(pen, (GAP, top + 2), f"{percent(row.share)} of {modality}", QUIET, 12)
        for column, token in enumerate(row.favourites):
            _cell(sheet, pen, cell_corner(line, column, modality), token, config)
    return np.asarray(sheet)


def _cell(
    sheet: Image.Image, pen: ImageDraw.ImageDraw, corner: tuple[int, int], token: Favourite, config: ModalitiesConfig
) -> None:
    left, top = corner
    width, height = CELLS[token.modality]
    if token.modality == "audio":
        picture, box = _sound(token, config.audio)
        start, end = seconds(token.place, config.audio)
        caption = f"{percent(token.probability)}, {start:.2f} to {end:.2f} s"
    else:
        picture, box = _picture(token, config.image)
        caption = percent(token.probability)
    sheet.paste(picture, corner)
    pen.rectangle((left - 1, top - 1, left + width, top + height), outline=OUTLINE)
    _frame(pen, box, corner)
    _text(pen, (left, top + height + 7), caption, QUIET, 12)


def _picture(token: Favourite, config: ImageConfig) -> tuple[Image.Image, Box]:
    from PIL import Image

    width, height = CELLS["image"]
    picture = Image.fromarray(_pixels(token.sample)).resize((width, height), Image.Resampling.BICUBIC)
    scale = width / config.size
    left, top, right, bottom = patch_box(token.place, config)
    return picture, (left * scale, top * scale, right * scale, bottom * scale)


def _sound(token: Favourite, config: AudioConfig) -> tuple[Image.Image, Box]:
    """The log-mel spectrogram, low bands at the bottom, loud is dark."""
    from PIL import Image

    mel = token.sample.audio
    assert mel is not None
    width, height = CELLS["audio"]
    low, high = float(mel.min()), float(mel.max())
    grey = 255 * (1 - (mel[::-1] - low) / max(high - low, 1e-6))
    picture = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    scale = width / mel.shape[1]
    left, right = token.place * config.patch * scale, (token.place + 1) * config.patch * scale
    return picture.resize((width, height), Image.Resampling.BILINEAR), (left, 0, right, height)


def _pixels(sample: Sample) -> np.ndarray:
    assert sample.image is not None
    return np.ascontiguousarray(sample.image.transpose(1, 2, 0))


def _frame(pen: ImageDraw.ImageDraw, box: Box, corner: tuple[int, int]) -> None:
    """Around the box, growing outwards: white, vermilion, white."""
    left, top = corner
    x0, y0 = left + math.floor(box[0]), top + math.floor(box[1])
    x1, y1 = left + math.ceil(box[2]), top + math.ceil(box[3])
    for grow, colour in ((1, EDGE), (2, FRAME), (3, FRAME), (4, FRAME), (5, EDGE)):
        pen.rectangle((x0 - grow, y0 - grow, x1 + grow - 1, y1 + grow - 1), outline=colour)


def percent(share: float) -> str:
    return "<1%" if 0 < share < 0.01 else f"{share:.0%}"


def _text(pen: ImageDraw.ImageDraw, where: tuple[float, float], text: str, colour: str, size: int) -> None:
    from PIL import ImageFont

    pen.text(where, text, fill=colour, font=ImageFont.load_default(size))
