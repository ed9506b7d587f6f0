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
