"""How files of a sample are encoded, and what comes of it: what ``images.py`` and ``audio.py`` share.

The content of an image or clip decides its format, not its name: ``https://host/image?id=3`` has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE_FORMATS = ("auto", "keep", "jpeg", "webp", "png")
SIDES = ("longest", "shortest")
AUDIO_FORMATS = ("keep", "flac", "opus", "wav")
CHANNELS = ("", "1", "keep")
OPUS_RATES = (8_000, 12_000, 16_000, 24_000, 48_000)  # Hz


@dataclass(frozen=True, slots=True)
class MediaOptions:
    """How files are encoded; the defaults leave them as they are."""

    image_size: int | None = None  # pixels of image_side, at most
    audio_rate: int | None = None  # Hz
    image_format: str = "auto"  # auto: as it is; JPEG (lossy sources) or PNG (lossless ones) where pixels change
    image_quality: int = 90  # of JPEG and WebP
    image_side: str = "longest"
    crop: bool = False  # the centre square
    audio_format: str = "keep"  # keep: as it is; FLAC where samples change
    audio_channels: str = ""  # "": mono where a clip is encoded again; "1": always mono; "keep": as many as there are

    def __post_init__(self) -> None:
        for name, values in _VALUES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is none of {', '.join(values)}")
        if self.audio_format == "opus" and self.audio_rate and self.audio_rate not in OPUS_RATES:
            rates = ", ".join(map(str, OPUS_RATES))
            raise ValueError(f"--audio-rate {self.audio_rate} is none that Opus has; choose one of {rates}")


_VALUES = {
    "image_format": IMAGE_FORMATS, "image_side": SIDES, "audio_format": AUDIO_FORMATS, "audio_channels": CHANNELS,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Media:
    """Bytes of a member and their suffix. ``facts``: of the file that was read, such as ``width`` and ``seconds``;
    ``encoded``: they are not the bytes of the file."""

    suffix: str
    data: bytes
    facts: Mapping[str, Any] = field(default_factory=dict)
    encoded: bool = False


Check = Callable[[Mapping[str, Any]], None]  # of the facts of a file; raises where it is not wanted


def suffix_of(name: str, suffixes: tuple[str, ...]) -> str:
    """The suffix of ``name`` if it is one of those of the content's format, else the first of these."""
    suffix = Path(name).suffix.lower().removeprefix(".")
    return suffix if suffix in suffixes else suffixes[0]
