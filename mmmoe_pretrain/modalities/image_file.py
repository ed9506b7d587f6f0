"""Any image of the formats that are read as an upright RGB image on white, in no more memory than twice its own.

Shared by the image modality and by ``mmmoe-data shard``. Imports Pillow alone at its top.
"""

from __future__ import annotations

import io

from PIL import Image, ImageOps

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

IMAGE_ERRORS: tuple[type[Exception], ...] = (*DECODER_ERRORS, Image.DecompressionBombError)  # of a damaged image
JPEG_SCALES = (1, 2, 4, 8)  # at which libjpeg decodes
WHITE = (255, 255, 255)
STRIP = 1 << 20  # pixels that are laid on white at once


def open_image(data: bytes, side: int | None = None) -> Image.Image:
    """The image in ``data``, checked by its header; nothing is decoded yet.

    A JPEG will be decoded at the smallest scale that leaves both sides ``side`` pixels (None: as it is), or at a
    smaller one where it would exceed the limit of pixels. Raises ValueError where it is not a usable image.
    """
    image = _identify(data)
    size, is_jpeg = image.size, image.format in ("JPEG", "MPO")
    if is_jpeg:
        fits = next(
            (s for s in JPEG_SCALES if -(-size[0] // s) * -(-size[1] // s) <= limits.MAX_PIXELS), JPEG_SCALES[-1]
        )
        wanted = min(size) // side if side else 1
        scale = max(fits, *(s for s in JPEG_SCALES if s == 1 or s <= wanted))
        image.draft(None, (max(1, size[0] // scale), max(1, size[1] // scale)))
    scanned = is_jpeg or "jpeg" in str(image.info.get("compression", "")).lower()  # a TIFF may hold JPEGs
    decoded = size if is_jpeg and jpeg_held_whole(data) else image.size
    problem = image_problem(size, decoded, jpeg_scans(data) if scanned else 1)
    if not problem and image.mode == "F":
        problem = "of 32-bit floats has no known range; convert it to 8 or 16 bits"
    if problem:
        raise ValueError(f"an image {problem}")
    return image


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


def upright_rgb(image: Image.Image) -> Image.Image:
    """Rotated by its EXIF, 16 bits scaled to 8, transparency on white. May change ``image``."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion would clip, not scale."""
    import numpy as np

    levels = np.asarray(image).clip(0, 65535) // 257
    return Image.fromarray(levels.astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    flat = Image.new("RGB", image.size)
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(image.height, top + rows))).convert("RGBA")
        white = Image.new("RGBA", strip.size, (*WHITE, 255))
        flat.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return flat
