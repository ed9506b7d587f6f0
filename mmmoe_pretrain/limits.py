"""Which files are read as an image, audio or text, what they may be, and what decoders raise on a damaged one.

Shared by the codecs, the loader and ``mmmoe-data``, so that what is sharded can be loaded. Imports
nothing heavy. Limits are checked by the header, before anything is decoded.
"""

from __future__ import annotations

import struct
import zlib

# The last part of a member's extension -> what it is read as. Of several the earlier one is preferred.
MODALITY_OF: dict[str, str] = {
    **dict.fromkeys(("png", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "tif", "tiff"), "image"),
    **dict.fromkeys(("flac", "ogg", "oga", "opus", "wav", "wave", "mp3"), "audio"),
    **dict.fromkeys(("txt", "text", "caption"), "text"),
}
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # no format that calls another program
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
