"""What a picture or sound may be, and what decoders raise on one that is damaged.

Shared by the codecs and by ``mmmoe-data shard``, so that what is sharded can be loaded. Imports
nothing heavy. Limits are checked by the header, before anything is decoded.
"""

from __future__ import annotations

import struct
import zlib

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # no format that calls another program
MAX_PIXELS = 64_000_000
MAX_CLIP_SECONDS = 600.0
MAX_CHANNELS = 32
SAMPLE_RATES = (1_000, 384_000)  # Hz

# Pillow, libsndfile and soxr raise all of these on damaged files (libsndfile's are RuntimeErrors, a
# broken PNG chunk is a SyntaxError), and Pillow its own DecompressionBombError besides. MemoryError
# is not here: it is the machine's, not the file's.
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
    struct.error,
    zlib.error,
)


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
    return None
