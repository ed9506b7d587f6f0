"""Limits of a sample's files, aliases of fields, and the errors of decoders on damaged files.

Shared by the modalities, the loader and ``mmmoe-data``, so that what is sharded can be loaded. Imports
nothing heavy. Limits are checked by the header, before anything is decoded.
"""

from __future__ import annotations

import re
import struct
import unicodedata
import zlib
from collections.abc import Sequence
from typing import Any

# Other names of a field, in a manifest and in a sample's JSON.
FIELD_ALIASES = {
    "__key__": "key",
    "id": "key",
    "caption": "text",
    "transcript": "text",
    "transcription": "text",
    "sentence": "text",
    "lang": "language",
    "class": "label",
    "license": "licence",
}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no format that calls another program
MAX_PIXELS = 64_000_000  # decoded ones: a JPEG may be decoded at a half, a quarter or an eighth of its size
MAX_SIDE = 65_535  # pixels; an image of one column costs Pillow seconds a million rows
MAX_SCANNED_PIXELS = 2_000_000_000  # pixels x scans of a progressive JPEG: each scan goes over all of them
AUDIO_FORMATS = ("WAV", "FLAC", "OGG", "MP3")
AUDIO_STARTS = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff")  # libsndfile reads two dozen formats more
MAX_CLIP_SECONDS = 600.0
MAX_CLIP_SAMPLES = 64_000_000  # over all channels
MAX_CHANNELS = 32
OTHER_STARTS = (  # of files that people take for images or audio, in lower case
    (b"<!doctype html", "HTML"), (b"<html", "HTML"), (b"<svg", "SVG"), (b"<?xml", "XML or SVG"), (b"{", "JSON"),
    (b"%pdf", "PDF"), (b"pk\3\4", "a zip"), (b"\x1f\x8b", "gzip"), (b"ftyp", "AVIF, HEIC or MP4"),
    (b"\x1a\x45\xdf\xa3", "WebM or Matroska"), (b"version https://git-lfs", "a pointer of Git LFS"),
)  # fmt: skip
SAMPLE_RATES = (1_000, 384_000)  # Hz
MAX_TEXT_BYTES = 1 << 20
MAX_META_BYTES = 1 << 20  # of a sample's JSON, and of a manifest's line
MAX_MEMBER_BYTES = 256 << 20  # of any file of a sample: read whole
MAX_KEY_BYTES = 512  # keys are an array in memory, as wide as the longest one
MAX_NAME_BYTES = 1024

# Characters of no width or form of their own, beside spaces, control and format characters: Unicode's
# Default_Ignorable_Code_Point, the empty Braille cell, and the mark of what could not be decoded.
_BLANK_CODES = (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2065, 0x2800, 0x3164, 0xFFA0, 0xFFFD)
_BLANK_RANGES = ((0x180B, 0x180F), (0xFE00, 0xFE0F), (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF))

# Pillow, libsndfile and soxr raise all of these on damaged files (libsndfile's are RuntimeErrors, a
# broken PNG chunk is a SyntaxError, a palette that is missing fails an assert of Pillow's), and Pillow its own
# DecompressionBombError besides. MemoryError is not here: it is the machine's, not the file's.
DECODER_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    RuntimeError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    struct.error,
    zlib.error,
)


def use_aliases(fields: dict[str, Any]) -> None:
    """Move the value of a field of another name (``FIELD_ALIASES``) to the field where that is absent or blank."""
    for alias, name in FIELD_ALIASES.items():
        value = fields.get(name)
        if alias in fields and (value is None or (isinstance(value, str) and not has_text(value))):
            fields[name] = fields.pop(alias)


def has_text(text: str) -> bool:
    """Whether ``text`` has visible content: the rule of `mmmoe-data`, of the loader and of the tokenizer.

    White space, control characters (Cc), format characters (Cf: zero-width spaces and joiners, marks of direction,
    the byte order mark) and variation selectors alone do not count as text.
    """
    return not all(map(_is_blank, text))


def has_lone_surrogate(text: str) -> bool:
    """Whether ``text`` holds half of a character, which JSON can and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _is_blank(letter: str) -> bool:
    if "!" <= letter <= "~":  # most texts begin so, and are decided by it
        return False
    code = ord(letter)
    return (
        letter.isspace()
        or unicodedata.category(letter) in ("Cc", "Cf")
        or code in _BLANK_CODES
        or any(first <= code <= last for first, last in _BLANK_RANGES)
    )


def decoder_reason(error: Exception) -> str:
    """A decoder's error message without addresses of objects, which differ from run to run."""
    text = re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "it", getattr(error, "error_string", "") or str(error))
    says_little = not text or not isinstance(error, OSError | ValueError | SyntaxError | RuntimeError)
    return ": ".join(filter(None, [type(error).__name__ if says_little else "", text]))


def start_problem(data: bytes, formats: Sequence[str]) -> str:
    """That a file begins like none of ``formats``, as the rest of a sentence. Its bytes may be secret: a row may name
    any file of the machine."""
    start = data[:64].lstrip().lower()
    found = next((name for mark, name in OTHER_STARTS if start.startswith(mark) or data[4:8] == mark), "")
    begins = f"begins like {found}" if found else f"has {len(data):,} bytes" if data else "is empty"
    return f"{begins} and is not {', '.join(formats[:-1])} or {formats[-1]}"


def image_problem(size: tuple[int, int], decoded: tuple[int, int], scans: int) -> str | None:
    """Why an image with this header cannot be used, as the end of a sentence; None if it can.

    ``decoded``: the width and height at which it is decoded.
    """
    width, height = size
    pixels = f"of {width} x {height} pixels"
    if decoded[0] * decoded[1] > MAX_PIXELS:
        return f"{pixels} exceeds the limit of {MAX_PIXELS} decoded pixels; shrink it"
    if max(width, height) > MAX_SIDE:
        return f"{pixels} exceeds the limit of {MAX_SIDE} pixels a side"
    if width * height * scans > MAX_SCANNED_PIXELS:
        return f"{pixels} in {scans} scans exceeds the limit of {MAX_SCANNED_PIXELS} pixels"
    return None


def jpeg_scans(data: bytes) -> int:
    """At most how often a JPEG decoder goes over the image: its start-of-scan marks (ISO 10918-1, B.1.1.3)."""
    return max(1, data.count(b"\xff\xda"))


def jpeg_held_whole(data: bytes) -> bool:
    """Whether a decoder holds the coefficients of the whole image at any scale: the JPEG is progressive, or each
    colour has its own scan (ISO 10918-1, B.1.1.4 to B.2.3)"""
    at, sequential, components = 2, False, 0
    while data[at : at + 1] == b"\xff" and at + 4 < len(data):
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame, and none of the tables between
            sequential, components = marker in (0xC0, 0xC1), int.from_bytes(data[at + 9 : at + 10])
        if marker == 0xDA:
            return not sequential or data[at + 4] < components
        at += 1 if marker == 0xFF else 2 + size
    return True


def audio_start_problem(data: bytes) -> str | None:
    """Whether ``data`` begins like none of the formats that are read, before any decoder sees it."""
    return None if data.startswith(AUDIO_STARTS) else start_problem(data, AUDIO_FORMATS)


def audio_problem(sample_rate: int, channels: int, frames: int) -> str | None:
    """Why a clip with this header cannot be used, as the end of a sentence; None if it can."""
    if not SAMPLE_RATES[0] <= sample_rate <= SAMPLE_RATES[1]:
        return f"at {sample_rate} Hz is outside {SAMPLE_RATES} Hz"
    if channels > MAX_CHANNELS:
        return f"with {channels} channels exceeds the limit of {MAX_CHANNELS}"
    if frames <= 0:
        return "has no samples"
    if frames > MAX_CLIP_SECONDS * sample_rate:
        return f"of {frames / sample_rate:.0f} s exceeds the limit of {MAX_CLIP_SECONDS:.0f} s"
    if frames * channels > MAX_CLIP_SAMPLES:
        return f"of {frames} x {channels} samples exceeds the limit of {MAX_CLIP_SAMPLES} samples"
    return None
