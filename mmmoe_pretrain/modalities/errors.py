"""The one error of every codec: this content cannot become arrays, and why.

The one place that catches what decoders raise on damaged input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from mmmoe_pretrain.limits import DECODER_ERRORS, decoder_reason

_ERRORS: tuple[type[Exception], ...] = (*DECODER_ERRORS, Image.DecompressionBombError)


class BadSampleError(Exception):
    """A sample's content cannot be used; the message says why."""


@contextmanager
def quarantine(what: str) -> Iterator[None]:
    """Turn what a decoder raises on damaged input into a BadSampleError that names ``what``."""
    try:
        yield
    except BadSampleError:
        raise
    except _ERRORS as error:
        raise BadSampleError(f"{what} cannot be decoded: {decoder_reason(error)}") from error
