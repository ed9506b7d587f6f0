"""The one error of every codec: this content cannot become arrays, and why.

The one place that catches what decoders raise on damaged input.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmmoe_pretrain.flatten import IMAGE_ERRORS
from mmmoe_pretrain.limits import decoder_reason


class BadSampleError(Exception):
    """A sample's content cannot be used; the message says why."""


@contextmanager
def quarantine(what: str) -> Iterator[None]:
    """Turn what a decoder raises on damaged input into a BadSampleError that names ``what``."""
    try:
        yield
    except BadSampleError:
        raise
    except IMAGE_ERRORS as error:
        raise BadSampleError(f"{what} cannot be decoded: {decoder_reason(error)}") from error
