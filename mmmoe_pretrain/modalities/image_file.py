"""Any image of the formats that are read as an upright RGB image, in no more memory than twice its own.

Shared by the image modality and by ``mmmoe-data shard``. Imports Pillow alone at its top. simplejpeg decodes JPEGs
where it is installed, else Pillow; both by libjpeg-turbo's exact transform, so that the pixels are the same.
"""

from __future__ import annotations

import functools
import importlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import PIL
from PIL import Image

from mmmoe_pretrain import limits
from mmmoe_pretrain.limits import (
    DECODER_ERRORS,
    IMAGE_FORMATS,
    decoder_reason,
    image_problem,
    jpeg_held_whole,
    jpeg_scans,
    start_problem,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGE_ERRORS: tuple[type[Exception], ...] = (*DECODER_ERRORS, Image.DecompressionBombError)  # of a damaged image
JPEG_SCALES = (1, 2, 4, 8)  # at which libjpeg decodes
WHITE = (255, 255, 255)
STRIP = 1 << 20  # pixels that are laid on the background at once
MOST_AT_ONCE = 1 << 22  # pixels of which simplejpeg's copy may be in memory beside Pillow's
ORIENTATION = 0x0112  # in EXIF


class Turn(NamedTuple):
    """How to make an image upright, and whether its right edge is then at the left, its lower edge at the top."""

    method: Image.Transpose
    right_is_left: bool
    bottom_is_top: bool


TURNS = {  # by orientation
    2: Turn(Image.Transpose.FLIP_LEFT_RIGHT, True, False),
    3: Turn(Image.Transpose.ROTATE_180, True, True),
    4: Turn(Image.Transpose.FLIP_TOP_BOTTOM, False, True),
    5: Turn(Image.Transpose.TRANSPOSE, False, False),
    6: Turn(Image.Transpose.ROTATE_270, True, False),
    7: Turn(Image.Transpose.TRANSVERSE, True, True),
    8: Turn(Image.Transpose.ROTATE_90, False, True),
}
SAME_SIDES = (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM)


@dataclass(frozen=True)
class Decoded:
    """Upright RGB ``pixels``, maybe at a smaller scale. ``content`` (left, top, right, bottom) shows the whole file:
    at half the scale 9 pixels take 4.5, and half of the fifth pixel is padding of the decoder's."""

    pixels: Image.Image | NDArray[np.uint8]
    content: tuple[float, float, float, float]

    @property
    def image(self) -> Image.Image:
        return self.pixels if isinstance(self.pixels, Image.Image) else Image.fromarray(self.pixels)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.pixels.size if isinstance(self.pixels, Image.Image) else self.pixels.shape[1::-1]


def decoders() -> str:
    """What decodes images here, for the log."""
    simplejpeg = _simplejpeg()
    with_pillow = f"Pillow {PIL.__version__}"
    return with_pillow if simplejpeg is None else f"simplejpeg {simplejpeg.__version__} for JPEG, else {with_pillow}"


@functools.cache
def _simplejpeg() -> Any:
    """The package, or None where it is not installed."""
    try:
        return importlib.import_module("simplejpeg")
    except ImportError:
        return None


class ImageReader:
    """The first image in ``data``, of ``size`` (width, height) upright. Raises one of IMAGE_ERRORS where it cannot be
    used. Of a JPEG the pixels are not decoded yet."""

    def __init__(self, data: bytes) -> None:
        self._data, self._image = data, _identify(data)
        self.format = "JPEG" if _is_jpeg(self._image) else self._image.format or ""
        self.mode, self.compression = self._image.mode, str(self._image.info.get("compression", ""))
        if not _is_jpeg(self._image):
            _check(self._image, self._image.size, data)
            self._image.load()  # before EXIF is read, which may stand behind the pixels
        self._turn = TURNS.get(self._image.getexif().get(ORIENTATION, 1))
        self._lies = self._turn is not None and self._turn.method not in SAME_SIDES
        self.size = self._image.size[::-1] if self._lies else self._image.size

    @property
    def is_turned(self) -> bool:
        """Its EXIF says that it does not lie upright in the file."""
        return self._turn is not None

    def check(self, shrinks: float) -> None:
        """Decode a JPEG to its end, at the scale of ``pixels``; other images are decoded already."""
        if self.format == "JPEG":
            _draft(self._image, shrinks)
            _check(self._image, self.size, self._data)
            _decode_jpeg(self._image, self._data)

    def pixels(self, shrinks: float = 1.0, background: tuple[int, int, int] = WHITE) -> Decoded:
        """Decoded. ``shrinks``: how many times fewer pixels a side are enough, at which scale a JPEG is decoded."""
        image = self._image
        content = 0.0, 0.0, float(image.width), float(image.height)
        if _is_jpeg(image):
            content = _draft(image, shrinks)
            _check(image, self.size, self._data)
            pixels = _decode_jpeg(image, self._data)
            if isinstance(pixels, Image.Image):
                image = pixels
            elif self._turn is None:
                return Decoded(pixels, content)
            else:
                image = Image.fromarray(pixels)
        image = _rgb(image, background)
        if self._turn is None:
            return Decoded(image, content)
        image = image.transpose(self._turn.method)
        width, height = content[3:1:-1] if self._lies else content[2:]
        left = image.width - width if self._turn.right_is_left else 0.0
        top = image.height - height if self._turn.bottom_is_top else 0.0
        return Decoded(image, (left, top, left + width, top + height))


def _is_jpeg(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO")


def _draft(image: Image.Image, shrinks: float) -> tuple[float, float, float, float]:
    """Have a JPEG decoded at the smallest scale that has enough pixels, and at most as many as are allowed; where the
    decoded image shows the whole file."""
    width, height = image.size
    fits = next((s for s in JPEG_SCALES if -(-width // s) * -(-height // s) <= limits.MAX_PIXELS), JPEG_SCALES[-1])
    scale = max(fits, *(s for s in JPEG_SCALES if s == 1 or s <= shrinks))
    drafted = image.draft(None, (max(1, width // scale), max(1, height // scale)))
    left, top, right, bottom = drafted[1] if drafted else (0, 0, *image.size)
    return float(left), float(top), float(right), float(bottom)


def _check(image: Image.Image, size: tuple[int, int], data: bytes) -> None:
    """By the header: ``size`` is that of the file, the image's own that at which it is decoded."""
    decoded, scans = image.size, 1
    if _is_jpeg(image):
        if jpeg_held_whole(data):  # else there is one scan
            decoded, scans = size, jpeg_scans(data)
    elif "jpeg" in str(image.info.get("compression", "")).lower():  # a TIFF may hold JPEGs
        scans = jpeg_scans(data)
    problem = image_problem(size, decoded, scans)
    if not problem and image.mode == "F":
        problem = "of 32-bit floats has no known range; convert it to 8 or 16 bits"
    if problem:
        raise ValueError(f"an image {problem}")


def _decode_jpeg(image: Image.Image, data: bytes) -> Image.Image | NDArray[np.uint8]:
    """The pixels of an opened JPEG. Where simplejpeg warns, Pillow decides, so that the rule is one with either: an
    early end is an error, and stray bytes between two parts are not."""
    simplejpeg = _simplejpeg()
    if simplejpeg is not None and image.mode == "RGB" and image.width * image.height <= MOST_AT_ONCE:
        try:
            pixels = simplejpeg.decode_jpeg(data, min_height=image.height, min_width=image.width)
        except ValueError:
            pass
        else:
            if pixels.shape == (image.height, image.width, 3):
                return pixels
    image.load()
    return image


def header_size(data: bytes) -> tuple[int, int]:
    """Width and height by the header, before the image is turned upright. Raises one of IMAGE_ERRORS."""
    with _identify(data) as image:
        return image.size


def _identify(data: bytes) -> Image.Image:
    """As ``Image.open``, whose own limit of pixels differs and ignores scaled decoding."""
    Image.init()
    for name in IMAGE_FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(data[:16]) is not True:
            continue
        try:
            return factory(io.BytesIO(data), "")
        except Image.DecompressionBombError:
            raise ValueError(
                f"an image of more than {limits.MAX_PIXELS} decoded pixels exceeds the limit; shrink it"
            ) from None
        except DECODER_ERRORS as error:
            raise ValueError(f"begins like a {name} and cannot be read further ({decoder_reason(error)})") from None
    raise ValueError(start_problem(data, IMAGE_FORMATS))


def _rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        return _on_background(image, background)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion would clip, not scale."""
    import numpy as np

    levels = np.asarray(image).clip(0, 65535) // 257
    return Image.fromarray(levels.astype(np.uint8))


def _on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    flat = Image.new("RGB", image.size, background)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows))).convert("RGBA")
        flat.paste(strip, (0, top), mask=strip)
    return flat
