"""Small copies of samples to look at: thumbnails, sounds of a few seconds, and a contact sheet.

All are encoded here from what was decoded: no byte of a file that others made is passed on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
import re
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote

import numpy as np

from mmmoe_pretrain.data_prep.console import printable
from mmmoe_pretrain.data_prep.samples import Piece, Sample
from mmmoe_pretrain.limits import decoder_reason
from mmmoe_pretrain.modalities.audio_file import open_audio, read_mono
from mmmoe_pretrain.modalities.image_file import IMAGE_ERRORS, ImageReader
from mmmoe_pretrain.paths import new_file
from mmmoe_pretrain.progress import track
from mmmoe_pretrain.urls import StorageError

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

SIDE = 128  # pixels of a thumbnail on the sheet
LINE = 15  # pixels of a line of text
CAPTION = 2 * LINE + 2
FONT_SIZE = 11
FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansDevanagari-Regular.ttf", "Arial Unicode.ttf")  # for further scripts
GAP = 6
COLUMNS = 10
GREY = (235, 235, 235)
SOUND_RATE = 24_000  # Hz
SOUND_SECONDS = 10.0
_LETTERS = 64  # of a line, at most
_NO_LETTER = "\uffff"  # no font has it


class Unreadable(ValueError):
    """A file that cannot be shown, and why."""


def thumbnail(piece: Piece, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """A copy of at most ``side`` pixels a side on white, and the width and height of the file. Raises Unreadable."""
    try:
        reader = ImageReader(_read(piece))
        image = reader.pixels(max(reader.size) / side).image
        image.thumbnail((side, side))
        return image, reader.size
    except StorageError:
        raise
    except IMAGE_ERRORS as error:
        raise Unreadable(decoder_reason(error)) from None


def sound(piece: Piece) -> tuple[bytes, float]:
    """The first SOUND_SECONDS as a mono MP3, and the seconds of the file. Raises Unreadable."""
    import soundfile
    import soxr

    try:
        with open_audio(_read(piece)) as file:
            seconds = file.frames / file.samplerate
            wave = read_mono(file, int(SOUND_SECONDS * file.samplerate))
            wave = np.clip(np.nan_to_num(wave), -1, 1)
            if file.samplerate != SOUND_RATE:
                wave = np.clip(soxr.resample(wave, file.samplerate, SOUND_RATE), -1, 1)
        buffer = io.BytesIO()
        soundfile.write(buffer, wave, SOUND_RATE, format="MP3", subtype="MPEG_LAYER_III")
        return buffer.getvalue(), seconds
    except StorageError:
        raise
    except IMAGE_ERRORS as error:
        raise Unreadable(decoder_reason(error)) from None


def write_sheet(path: Path, samples: Sequence[Sample]) -> None:
    """A grid of the samples: the first image of each, else its text or kind, with its caption."""
    from PIL import Image, ImageDraw

    columns = max(1, min(COLUMNS, len(samples)))
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, max(1, rows) * (SIDE + CAPTION + GAP) + GAP), "white")
    pen = _Pen(ImageDraw.Draw(sheet))
    for number, sample in enumerate(track(samples, "drawing the sheet", len(samples), "samples")):
        left = GAP + number % columns * (SIDE + GAP)
        top = GAP + number // columns * (SIDE + CAPTION + GAP)
        image, note = _tile(sample)
        if image is None:
            pen.draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=GREY)
            pen.write((left + 4, top + 4), note, SIDE - 8, 8)
        else:
            sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
        pen.write((left, top + SIDE + 1), unquote(sample.key), SIDE)
        pen.write((left, top + SIDE + 1 + LINE), _words(sample), SIDE)
    with new_file(path) as draft:
        sheet.save(draft, "PNG")


def _tile(sample: Sample) -> tuple[Image.Image | None, str]:
    """The first image, or what is written in its place."""
    for piece in sample.pieces:
        if piece.kind == "image" and piece.read is not None:
            try:
                return thumbnail(piece, SIDE)[0], ""
            except Unreadable as error:
                return None, f"image: {error}"
    return None, sample.problem or _words(sample)


def _words(sample: Sample) -> str:
    """Its first text, else what it holds."""
    try:
        return next(sample.texts(), " + ".join(sample.held))
    except StorageError:
        raise
    except ValueError as error:
        return str(error)


class _Pen:
    """Writes texts, each in the font that has the most of its letters; the others become ``(no font)``."""

    def __init__(self, draw: ImageDraw.ImageDraw) -> None:
        from PIL import ImageFont

        self.draw, self._fonts, self._lacking = draw, _fonts(), dict[tuple[int, str], bool]()
        self._plain = [font.font_variant(layout_engine=ImageFont.Layout.BASIC) for font in self._fonts]

    def write(self, place: tuple[int, int], text: str, width: int, lines: int = 1) -> None:
        """On at most so many lines of so many pixels."""
        text = printable(" ".join(text[: _LETTERS * lines].split()))
        number = min(range(len(self._fonts)), key=lambda number: sum(self._lacks(number, c) for c in text))
        text = "".join(_NO_LETTER if self._lacks(number, letter) else letter for letter in text)
        text = re.sub(f"{_NO_LETTER}[{_NO_LETTER} ]*", "(no font) ", text).strip()
        for line in range(lines):
            end = self._fitting(number, text, width)
            if end < len(text) and line == lines - 1:
                text = text[: self._fitting(number, text, width, "…")] + "…"
                end = len(text)
            elif end < len(text):
                end = max(text.rfind(" ", 0, end + 1), 0) or end
            self.draw.text((place[0], place[1] + line * LINE), text[:end], fill="black", font=self._fonts[number])
            text = text[end:].lstrip()

    def _fitting(self, number: int, text: str, width: int, end: str = "") -> int:
        """How many letters of ``text``, before ``end``, fit."""
        font = self._fonts[number]
        return bisect(range(1, len(text) + 1), width, key=lambda n: math.ceil(font.getlength(text[:n] + end)))

    def _lacks(self, number: int, letter: str) -> bool:
        if (number, letter) not in self._lacking:
            drawn, absent = (bytes(self._plain[number].getmask(each)) for each in (letter, _NO_LETTER))
            self._lacking[number, letter] = drawn == absent
        return self._lacking[number, letter]


def _read(piece: Piece) -> bytes:
    if piece.read is None:
        raise ValueError("it lies at a URL, which is not fetched to look at it")
    return piece.read()


def _fonts() -> list[ImageFont.FreeTypeFont]:
    """Matplotlib's DejaVu Sans, which has Greek, Cyrillic and Arabic letters, too, and those of FONTS that are
    installed. Matplotlib itself is not imported."""
    from PIL import ImageFont

    spec, found = importlib.util.find_spec("matplotlib"), []
    dejavu = Path(str(spec and spec.origin)).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    for name in (dejavu, *FONTS):
        with contextlib.suppress(OSError):
            found.append(ImageFont.truetype(name, FONT_SIZE))
    return found or [cast("ImageFont.FreeTypeFont", ImageFont.load_default(FONT_SIZE))]
