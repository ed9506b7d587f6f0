"""What a picture, a sound or a text may be, and what decoders raise on one that is damaged.

Shared by the codecs and by ``mmmoe-data shard``, so that what is sharded can be loaded. Imports
nothing heavy. Limits are checked by the header, before anything is decoded.
"""

from __future__ import annotations

import struct
import unicodedata
import zlib

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # no format that calls another program
MAX_PIXELS = 64_000_000
MAX_SIDE = 65_535  # pixels; a picture of one column costs Pillow seconds a million rows
MAX_SCANNED_PIXELS = 2_000_000_000  # pixels x scans of a progressive JPEG: each scan goes over all of them
SOUND_STARTS = (b"RIFF", b"fLaC", b"OggS", b"ID3", b"\xff")  # libsndfile reads two dozen formats more
MAX_CLIP_SECONDS = 600.0
MAX_CLIP_SAMPLES = 64_000_000  # over all channels
MAX_CHANNELS = 32
SAMPLE_RATES = (1_000, 384_000)  # Hz
MAX_TEXT_BYTES = 1 << 20
MAX_META_BYTES = 1 << 20  # of a sample's JSON, and of a manifest's line
MAX_MEMBER_BYTES = 256 << 20  # of any file of a sample: read whole
MAX_KEY_BYTES = 512  # keys stand in memory as an array as wide as the longest
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


def has_text(text: str) -> bool:
    """Whether ``text`` says anything: the one rule of `mmmoe-data`, of the loader and of the tokenizer.

    White space, control characters (Cc), format characters (Cf: zero-width spaces and joiners, marks of direction,
    the byte order mark) and variation selectors alone are no text.
    """
    return not all(map(_is_blank, text))


def _is_blank(letter: str) -> bool:
    code = ord(letter)
    return (
        letter.isspace()
        or unicodedata.category(letter) in ("Cc", "Cf")
        or code in _BLANK_CODES
        or any(first <= code <= last for first, last in _BLANK_RANGES)
    )


def image_problem(width: int, height: int, scans: int) -> str | None:
    """What a header says that no usable picture has, as the rest of a sentence; None if it is fine."""
    if width * height > MAX_PIXELS:
        return f"of {width} x {height} pixels exceeds the limit of {MAX_PIXELS} pixels"
    if max(width, height) > MAX_SIDE:
        return f"of {width} x {height} pixels exceeds the limit of {MAX_SIDE} pixels a side"
    if width * height * scans > MAX_SCANNED_PIXELS:
        return f"of {width} x {height} pixels in {scans} scans exceeds the limit of {MAX_SCANNED_PIXELS} pixels"
    return None


def image_scans(data: bytes) -> int:
    """At most how often a decoder goes over the picture: the start-of-scan marks of a JPEG (ISO 10918-1, B.1.1.3)."""
    return max(1, data.count(b"\xff\xda")) if data[:2] == b"\xff\xd8" else 1


def sound_start_problem(data: bytes) -> str | None:
    """Whether ``data`` begins like none of the formats that are read, before any decoder sees it."""
    if data.startswith(SOUND_STARTS):
        return None
    return f"cannot be decoded: it begins with {data[:4]!r}, and is no WAV, FLAC, OGG or MP3"


def sound_problem(sample_rate: int, channels: int, frames: int) -> str | None:
    """What a header says that no usable sound has, as the rest of a sentence; None if it is fine."""
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
