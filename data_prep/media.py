"""Files of a sample to the bytes a shard holds: decoded once here, so that a broken one never ships.

An image is shrunk and composited on white; a sound is mixed to mono and resampled. Where no change is
asked for, the original bytes pass. Every failure is a ValueError that says what is wrong with the file.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

IMAGE_SUFFIXES = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}
AUDIO_SUFFIXES = {".flac": "flac", ".ogg": "ogg", ".wav": "wav"}


@dataclass(frozen=True, slots=True)
class Media:
    """Encoded bytes and the suffix they go by."""

    suffix: str
    data: bytes


@functools.lru_cache(maxsize=8192)  # rows share pictures; shrunk ones are a few KB
def image_member(path: Path, size: int | None) -> Media:
    """The picture, its longest side at most ``size`` pixels (None: as it is)."""
    from PIL import Image, UnidentifiedImageError

    suffix = _suffix(path, IMAGE_SUFFIXES)
    data = _read(path)
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return Media(suffix, data) if size is None else Media("png", _shrunk_png(image, size))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name} is no readable image: {error}") from None


def audio_member(path: Path, rate: int | None) -> Media:
    """The sound, as mono FLAC at ``rate`` Hz (None: as it is)."""
    import soundfile

    suffix = _suffix(path, AUDIO_SUFFIXES)
    data = _read(path)
    try:
        samples, found_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, ValueError) as error:
        raise ValueError(f"{path.name} is no readable sound: {error}") from None
    if not len(samples):
        raise ValueError(f"{path.name} is an empty sound")
    return Media(suffix, data) if rate is None else Media("flac", _mono_flac(samples, found_rate, rate))


def audio_seconds(data: bytes) -> float:
    """Length of an encoded sound, from its header."""
    import soundfile

    try:
        info = soundfile.info(io.BytesIO(data))
    except soundfile.LibsndfileError as error:
        raise ValueError(f"no readable sound: {error}") from None
    return info.frames / info.samplerate


def _shrunk_png(image: Image.Image, size: int) -> bytes:
    from PIL import Image

    layer = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    flat.thumbnail((size, size), Image.Resampling.LANCZOS)  # never enlarges
    buffer = io.BytesIO()
    flat.save(buffer, "PNG")
    return buffer.getvalue()


def _mono_flac(samples: NDArray[np.float32], found_rate: int, rate: int) -> bytes:
    import numpy as np
    import soundfile
    import soxr

    mono = np.ascontiguousarray(samples.mean(axis=1))
    if found_rate != rate:
        mono = soxr.resample(mono, found_rate, rate, quality="HQ")
    if not len(mono):
        raise ValueError(f"the sound is shorter than one sample at {rate} Hz")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(mono, -1.0, 1.0), rate, format="FLAC", subtype="PCM_16")
    return buffer.getvalue()


def _suffix(path: Path, known: dict[str, str]) -> str:
    suffix = known.get(path.suffix.lower())
    if suffix is None:
        raise ValueError(f"{path.name}: suffix {path.suffix!r} is not one of {', '.join(known)}")
    return suffix


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from None
