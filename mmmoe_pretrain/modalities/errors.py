"""The one error of every codec: this content cannot become arrays, and why.

Owns the list of what decoders raise on damaged input; no other place catches these.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

# Pillow, libsndfile and soxr raise all of these on damaged files (libsndfile's are RuntimeErrors,
# a broken PNG chunk is a SyntaxError). MemoryError is not here: it is the machine's, not the sample's.
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
    Image.DecompressionBombError,
)


class BadSampleError(Exception):
    """A sample's content cannot be used; the message says why."""


@contextmanager
def quarantine(what: str) -> Iterator[None]:
    """Turn what a decoder raises on damaged input into a BadSampleError that names ``what``."""
    try:
        yield
    except BadSampleError:
        raise
    except DECODER_ERRORS as error:
        raise BadSampleError(f"{what} cannot be decoded: {type(error).__name__}: {error}") from error
