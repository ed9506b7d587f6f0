"""Keeps megatron-core's notes on packages that are optional here out of every rank's output."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

OPTIONAL = "(?s).*(Transformer Engine|Apex|apex|moe_ffn_hidden_size|full scope is deprecated)"


@contextlib.contextmanager
def quiet_megatron() -> Iterator[None]:
    """Around imports of megatron-core and the making of its configs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OPTIONAL)
        yield
