"""An image -> its bytes in a shard: as they are, or upright, cropped, shrunk and encoded again as RGB.

A JPEG is decoded at a scale that has enough pixels. Transparency is composited on white, 16 bits become 8, and of an
animation the first frame is taken. ICC profiles are not applied, as the loader does not.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import xxhash
from PIL import Image

from mmmoe_pretrain.data_prep.shards.media import Check, Media, MediaOptions, suffix_of
from mmmoe_pretrain.limits import decoder_reason
from mmmoe_pretrain.modalities.image_file import IMAGE_ERRORS, ImageReader

SUFFIXES = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"), "PNG": ("png",), "WEBP": ("webp",), "GIF": ("gif",), "BMP": ("bmp",),
    "TIFF": ("tif", "tiff"),
}  # fmt: skip
# Pixels a side that a JPEG is decoded with for one of a lossy output, and the filter for these. Against a full decode
# and Lanczos, of photographs shrunk to 512 pixels: 54 dB in 5 ms; area averaging of a full decode (img2dataset's
# default) 52 dB in 6 ms, Lanczos of twice the pixels exact in 15 ms.
MARGIN = 1.25
LOSSY_FILTER, LOSSLESS_FILTER, GAP = Image.Resampling.HAMMING, Image.Resampling.LANCZOS, 2.0
WEBP_METHOD = 2  # of 6: as small as 4, the default, in less than half the time
_CHECKED_SCALE = 8.0  # all of a JPEG's data is read at any scale

Box = tuple[float, float, float, float]


def image_member(name: str, data: bytes, options: MediaOptions, check: Check) -> Media:
    """The image in ``data``; ``check`` gets its facts before it is encoded. Raises ValueError, with the rest of a
    sentence."""
    try:
        reader = ImageReader(data)
        width, height = reader.size
        facts = {"width": width, "height": height, "image_xxh3": xxhash.xxh3_128_hexdigest(data)}
        check(facts)
        target = _target(reader, data, options)
        if target is None:
            reader.check(_CHECKED_SCALE)
            return Media(suffix_of(name, SUFFIXES[reader.format]), data, facts)
        return Media(SUFFIXES[target][0], _encode(reader, data, target, options), facts, encoded=True)
    except IMAGE_ERRORS as error:
        raise ValueError(f"is not a readable image: {decoder_reason(error)}") from None


def _target(reader: ImageReader, data: bytes, options: MediaOptions) -> str | None:
    """The format to encode as; None: the bytes stay. A lossy image loses by each encoding, so one that needs no
    change stays; a lossless one is encoded wherever a size is asked for."""
    is_asked = options.image_size is not None or options.crop
    by_loss = "JPEG" if _is_lossy(reader, data) else "PNG"
    own = reader.format if reader.format in ("JPEG", "WEBP", "PNG") else by_loss
    chosen = {"auto": by_loss, "keep": own}.get(options.image_format, options.image_format.upper())
    if not is_asked and (options.image_format in ("auto", "keep") or chosen == reader.format):
        return None
    box, size = _view(reader.size, options)
    changes = reader.is_turned or size != reader.size or box[2] - box[0] < reader.size[0] or box[1] > 0
    if not changes and chosen == reader.format and _is_lossy(reader, data) and reader.mode in ("RGB", "L"):
        return None
    return chosen


def _is_lossy(reader: ImageReader, data: bytes) -> bool:
    if reader.format == "WEBP":
        return not _is_lossless_webp(data)
    return reader.format == "JPEG" or "jpeg" in reader.compression


def _is_lossless_webp(data: bytes) -> bool:
    """By the chunk of the first frame (RFC 9649, 2.5 to 2.7)."""
    at = 12
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if name in (b"VP8 ", b"VP8L"):
            return name == b"VP8L"
        at += 8 + (16 if name == b"ANMF" else size + size % 2)  # a frame of an animation has chunks of its own
    return False


def _encode(reader: ImageReader, data: bytes, target: str, options: MediaOptions) -> bytes:
    box, size = _view(reader.size, options)
    is_lossless = target == "PNG" or (
        target == "WEBP" and options.image_format == "keep" and not _is_lossy(reader, data)
    )
    shrinks = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])
    decoded = reader.pixels(shrinks / (GAP if is_lossless else MARGIN))
    image, (left, top, right, bottom) = decoded.image, decoded.content
    across, down = (right - left) / reader.size[0], (bottom - top) / reader.size[1]
    part = left + box[0] * across, top + box[1] * down, left + box[2] * across, top + box[3] * down
    size = min(size[0], max(1, int(part[2] - part[0]))), min(size[1], max(1, int(part[3] - part[1])))
    if image.size != size or part != (0, 0, *size):
        resample = LOSSLESS_FILTER if is_lossless else LOSSY_FILTER
        image = image.resize(size, resample, box=part, reducing_gap=GAP if is_lossless else None)
    buffer = io.BytesIO()
    if target == "PNG":
        image.save(buffer, "PNG", **({} if reader.format == "PNG" else {"icc_profile": None}))
    elif target == "WEBP":
        image.save(buffer, "WEBP", quality=options.image_quality, lossless=is_lossless, method=WEBP_METHOD)
    else:
        image.save(buffer, "JPEG", quality=options.image_quality)
    return buffer.getvalue()


def _view(size: tuple[int, int], options: MediaOptions) -> tuple[Box, tuple[int, int]]:
    """The part of an upright image that is taken, and the size that it gets; nothing is enlarged."""
    width, height = size
    left, top = 0, 0
    if options.crop:
        side = min(size)
        left, top, width, height = (width - side) // 2, (height - side) // 2, side, side
    box = float(left), float(top), float(left + width), float(top + height)
    measured = max if options.image_side == "longest" else min
    wanted = options.image_size
    if wanted is None or measured(width, height) <= wanted:
        return box, (width, height)
    if (width > height) == (options.image_side == "longest"):
        return box, (wanted, _rounded(wanted * height / width, lambda n: abs(width / height - wanted / n)))
    return box, (_rounded(wanted * width / height, lambda n: abs(width / height - n / wanted)), wanted)


def _rounded(side: float, error: Callable[[int], float]) -> int:
    """The whole number of pixels, up or down, with the smaller error of the aspect ratio, as Pillow's thumbnails."""
    lower = max(1, int(side))
    return min(lower, max(1, lower + (side > lower)), key=error)
