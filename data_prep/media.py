"""Files of a sample -> the bytes that a shard holds. Each is decoded once, so that no broken one gets into a shard.

An image is turned upright, shrunk and composited on white; a clip is mixed to mono and resampled. Without
--image-size and --audio-rate the bytes stay as they are. Every failure is a ValueError that says what is wrong with
the file. The limits are those of the loader.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmmoe_pretrain.limits import DECODER_ERRORS, MAX_MEMBER_BYTES, decoder_reason
from mmmoe_pretrain.modalities.audio_file import open_audio, read_mono
from mmmoe_pretrain.untrusted import read_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

DECODED = ("image", "audio")  # kinds whose files are decoded here; those of others pass as they are
_LOUDEST = 1000.0  # 1 is full scale; what soxr does to floats that are much louder is not a number


@dataclass(frozen=True, slots=True)
class Media:
    """Encoded bytes and their suffix."""

    suffix: str
    data: bytes


def member(kind: str, path: Path, image_size: int | None, audio_rate: int | None) -> Media:
    """The file as a member of a shard; of a kind that is not converted, its bytes as they are."""
    if kind == "image":
        return image_member(path, None) if image_size is None else shrunk_image_member(path, image_size)
    if kind == "audio":
        return audio_member(path, audio_rate)
    return Media(_suffix(path, kind), _read(path))


@functools.lru_cache(maxsize=1024)  # rows share images; only shrunk ones are small enough to keep
def shrunk_image_member(path: Path, size: int) -> Media:
    """``image_member``, from a cache."""
    return image_member(path, size)


def image_member(path: Path, size: int | None) -> Media:
    """The image, its longest side at most ``size`` pixels (None: as it is)."""
    from mmmoe_pretrain.modalities.image_file import IMAGE_ERRORS, open_image

    suffix = _suffix(path, "image")
    data = _read(path)
    try:
        with open_image(data) as image:
            image.load()
            return Media(suffix, data) if size is None else Media("png", _shrunk_png(image, size))
    except IMAGE_ERRORS as error:
        raise ValueError(f"{path.name} is not a readable image: {decoder_reason(error)}") from None


def audio_member(path: Path, rate: int | None) -> Media:
    """The clip, as mono FLAC at ``rate`` Hz (None: as it is)."""
    import numpy as np

    suffix = _suffix(path, "audio")
    data = _read(path)
    try:
        with open_audio(data) as file:
            mono = read_mono(file)
            if not np.isfinite(mono).all():
                raise ValueError("it holds NaN or infinite samples")
            return Media(suffix, data) if rate is None else Media("flac", _flac(mono, file.samplerate, rate))
    except DECODER_ERRORS as error:
        raise ValueError(f"{path.name} is not readable audio: {decoder_reason(error)}") from None


def audio_seconds(data: bytes) -> float:
    """Length of an encoded clip within the limits."""
    try:
        with open_audio(data) as file:
            return float(file.frames / file.samplerate)
    except DECODER_ERRORS as error:
        raise ValueError(f"no readable audio: {decoder_reason(error)}") from None


def _shrunk_png(image: Image.Image, size: int) -> bytes:
    from PIL import Image

    from mmmoe_pretrain.modalities.image_file import upright_rgb

    flat = upright_rgb(image)
    flat.thumbnail((size, size), Image.Resampling.LANCZOS)  # never enlarges
    buffer = io.BytesIO()
    flat.save(buffer, "PNG")
    return buffer.getvalue()


def _flac(mono: NDArray[np.float32], found_rate: int, rate: int) -> bytes:
    import numpy as np
    import soundfile
    import soxr

    if found_rate != rate:
        mono = soxr.resample(np.clip(mono, -_LOUDEST, _LOUDEST), found_rate, rate, quality="HQ")
    if not len(mono):
        raise ValueError(f"it is shorter than one sample at {rate} Hz")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(mono, -1.0, 1.0), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _suffix(path: Path, kind: str) -> str:
    from mmmoe_pretrain import kinds

    formats = kinds.MODALITIES.load(kind).formats
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in formats:
        raise ValueError(f"{path.name}: suffix {path.suffix!r} is not one of {', '.join(f'.{f}' for f in formats)}")
    return suffix


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_MEMBER_BYTES)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from None
