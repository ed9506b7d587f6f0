"""Small copies of samples to look at: thumbnails, sounds of a few seconds, and a contact sheet.

All are encoded here from what was decoded: no byte of a file that others made is passed on.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.console import printable
from data_prep.samples import Piece, Sample
from mmmoe_pretrain.limits import decoder_reason
from mmmoe_pretrain.modalities.audio_file import open_audio, read_mono
from mmmoe_pretrain.modalities.image_file import IMAGE_ERRORS, ImageReader
from mmmoe_pretrain.paths import new_file
from mmmoe_pretrain.progress import track
from mmmoe_pretrain.urls import StorageError

if TYPE_CHECKING:
    from PIL import Image, ImageFont

SIDE = 128  # pixels of a thumbnail on the sheet
CAPTION = 32  # pixels of two lines
GAP = 6
COLUMNS = 10
GREY = (235, 235, 235)
SOUND_RATE = 24_000  # Hz
SOUND_SECONDS = 10.0
_LETTERS = 20  # of a line of a caption


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
    draw, font = ImageDraw.Draw(sheet), _font()
    for number, sample in enumerate(track(samples, "drawing the sheet", len(samples), "samples")):
        left = GAP + number % columns * (SIDE + GAP)
        top = GAP + number // columns * (SIDE + CAPTION + GAP)
        image, note = _tile(sample)
        if image is None:
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=GREY)
            draw.multiline_text((left + 4, top + 4), "\n".join(_lines(note, 8)), fill="black", font=font)
        else:
            sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
        caption = [sample.key, _words(sample)]
        draw.multiline_text(
            (left, top + SIDE + 1), "\n".join(_lines(line, 1)[0] for line in caption), fill="black", font=font
        )
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


def _lines(text: str, most: int) -> list[str]:
    text = printable(" ".join(text[: 2 * _LETTERS * most].split()))
    return [text[at : at + _LETTERS] for at in range(0, len(text), _LETTERS)][:most] or [""]


def _read(piece: Piece) -> bytes:
    if piece.read is None:
        raise ValueError("it lies at a URL, which is not fetched to look at it")
    return piece.read()


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Matplotlib's font, which has Greek, Cyrillic and Arabic letters, too; Matplotlib itself is not imported."""
    from PIL import ImageFont

    spec = importlib.util.find_spec("matplotlib")
    try:
        return ImageFont.truetype(Path(str(spec and spec.origin)).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", 11)
    except OSError:
        return ImageFont.load_default()
