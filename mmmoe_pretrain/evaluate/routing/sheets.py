"""Contact sheets: the top-activating tokens of experts, each framed in the image that its modality draws of the item.

A row an expert, its tokens from left to right. Owns the layout, by Pillow: a sheet of a hundred small images takes a
tenth of a second. The frame is vermilion with a white edge, outside of what it frames, so that it can be seen on any
ground and by colour-blind readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmmoe_pretrain.evaluate.routing.top_tokens import TopToken
from mmmoe_pretrain.modalities import Modality

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

ROWS = 16  # experts on a sheet; more go to further sheets
RARE = 0.1  # of an even share of the modality: experts with less are not shown
SQUARE, WIDE = (112, 112), (160, 80)  # pixels: width and height of a cell, in a sheet where some image is wide
LABEL_WIDTH, HEADER, CAPTION, GAP = 104, 38, 26, 12
INK, QUIET, OUTLINE, FRAME, EDGE = "#222222", "#6B6B6B", "#DADADA", "#D55E00", "#FFFFFF"
Box = tuple[float, float, float, float]  # left, top, right, bottom
Cell = tuple[float, "Image.Image", Box]  # the token's probability, what is drawn, and the token in it


@dataclass(frozen=True)
class Row:
    """One expert's line: ``share`` is the expert's share of the modality's assignments."""

    expert: int
    share: float
    tokens: list[TopToken]


def worth_a_look(share: float, experts: int) -> bool:
    """The expert has enough of the modality's tokens to be shown."""
    return share >= RARE / experts


def draw(title: str, modality: Modality, rows: Sequence[Row]) -> list[np.ndarray]:
    """uint8 [height, width, 3] of each sheet; rows without tokens are omitted. Empty where the modality draws
    nothing."""
    lines: list[tuple[Row, list[Cell]]] = []
    for row in rows:
        found = [(token.probability, modality.draw(token.item.value, token.token)) for token in row.tokens]
        cells = [(probability, *drawn) for probability, drawn in found if drawn is not None]
        lines += [(row, cells)] if cells else []
    wide = any(drawn.width > drawn.height for _, cells in lines for _, drawn, _ in cells)
    starts = range(0, len(lines), ROWS)
    return [_sheet(title, modality.name, lines[at : at + ROWS], WIDE if wide else SQUARE) for at in starts]


def cell_corner(line: int, column: int, size: tuple[int, int]) -> tuple[int, int]:
    """Where the image in ``line`` and ``column`` of a sheet begins: left, top in pixels."""
    width, height = size
    return LABEL_WIDTH + column * (width + GAP), HEADER + line * (height + CAPTION + GAP)


def fitted(drawn: Image.Image, cell: tuple[int, int]) -> tuple[int, int]:
    """The largest size in a cell at the image's aspect, which counts as 2 to 1 where it is longer than that."""
    aspect = min(2.0, max(0.5, drawn.width / drawn.height))
    width = min(float(cell[0]), cell[1] * aspect)
    return round(width), round(width / aspect)


def _sheet(title: str, name: str, lines: Sequence[tuple[Row, list[Cell]]], size: tuple[int, int]) -> np.ndarray:
    from PIL import Image, ImageDraw

    width, height = cell_corner(len(lines), max(len(cells) for _, cells in lines), size)
    sheet = Image.new("RGB", (max(width, 640), height), EDGE)
    pen = ImageDraw.Draw(sheet)
    _text(pen, (GAP, GAP), title, INK, 15)
    for line, (row, cells) in enumerate(lines):
        top = cell_corner(line, 0, size)[1] + size[1] // 2
        _text(pen, (GAP, top - 18), f"expert {row.expert}", INK, 15)
        _text(pen, (GAP, top + 2), f"{percent(row.share)} of {name}", QUIET, 12)
        for column, (probability, drawn, box) in enumerate(cells):
            left, top = cell_corner(line, column, size)
            shown = fitted(drawn, size)
            sheet.paste(drawn.resize(shown, Image.Resampling.BICUBIC), (left, top))
            pen.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=OUTLINE)
            _frame(pen, tuple(share * side for share, side in zip(box, (*shown, *shown), strict=True)), (left, top))
            _text(pen, (left, top + size[1] + 7), percent(probability), QUIET, 12)
    return np.asarray(sheet)


def _frame(pen: ImageDraw.ImageDraw, box: tuple[float, ...], corner: tuple[int, int]) -> None:
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
