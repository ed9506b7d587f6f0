"""Files of a sample to the bytes a shard holds: decoded once here, so that a broken one never ships.

An image is turned upright, shrunk and composited on white; a sound is mixed to mono and resampled. Where
no change is asked for, the original bytes pass. Every failure is a ValueError that says what is wrong
with the file. The limits are those of the loader.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmmoe_pretrain.audio_file import open_audio, read_mono
from mmmoe_pretrain.limits import (
    DECODER_ERRORS,
    IMAGE_FORMATS,
    MAX_MEMBER_BYTES,
    image_problem,
    image_scans,
)
from mmmoe_pretrain.untrusted import read_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

IMAGE_SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpeg", ".webp": "webp"}
AUDIO_SUFFIXES = {".flac": "flac", ".ogg": "ogg", ".wav": "wav", ".mp3": "mp3"}

_LOUDEST = 1000.0  # 1 is full scale; what soxr does to floats that are much louder is not a number


@dataclass(frozen=True, slots=True)
class Media:
    """Encoded bytes and the suffix they go by."""

    suffix: str
    data: bytes


def image_member(path: Path, size: int | None) -> Media:
    """The picture, its longest side at most ``size`` pixels (None: as it is)."""
    return _image_member(path, None) if size is None else _shrunk_member(path, size)


@functools.lru_cache(maxsize=1024)  # rows share pictures; only shrunk ones are small enough to keep
def _shrunk_member(path: Path, size: int) -> Media:
    return _image_member(path, size)


def _image_member(path: Path, size: int | None) -> Media:
    from PIL import Image

    errors: tuple[type[Exception], ...] = (*DECODER_ERRORS, Image.DecompressionBombError)
    suffix = _suffix(path, IMAGE_SUFFIXES)
    data = _read(path)
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            problem = image_problem(image.width, image.height, image_scans(data))
            if problem:
                raise ValueError(f"an image {problem}")
            image.load()
            return Media(suffix, data) if size is None else Media("png", _shrunk_png(image, size))
    except errors as error:
        raise ValueError(f"{path.name} is no readable image: {_reason(error)}") from None


def audio_member(path: Path, rate: int | None) -> Media:
    """The sound, as mono FLAC at ``rate`` Hz (None: as it is)."""
    import numpy as np

    suffix = _suffix(path, AUDIO_SUFFIXES)
    data = _read(path)
    try:
        with open_audio(data) as file:
            mono = read_mono(file)
            if not np.isfinite(mono).all():
                raise ValueError("it holds NaN or infinite samples")
            return Media(suffix, data) if rate is None else Media("flac", _flac(mono, file.samplerate, rate))
    except DECODER_ERRORS as error:
        raise ValueError(f"{path.name} is no readable audio: {_reason(error)}") from None


def audio_seconds(data: bytes) -> float:
    """Length of an encoded sound within the limits."""
    try:
        with open_audio(data) as file:
            return float(file.frames / file.samplerate)
    except DECODER_ERRORS as error:
        raise ValueError(f"no readable audio: {_reason(error)}") from None


def _shrunk_png(image: Image.Image, size: int) -> bytes:
    from PIL import Image

    from mmmoe_pretrain.flatten import upright_rgb

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


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _suffix(path: Path, known: dict[str, str]) -> str:
    suffix = known.get(path.suffix.lower())
    if suffix is None:
        raise ValueError(f"{path.name}: suffix {path.suffix!r} is not one of {', '.join(known)}")
    return suffix


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_MEMBER_BYTES)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from None
