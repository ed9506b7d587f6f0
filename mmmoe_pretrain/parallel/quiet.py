"""Suppresses warnings of megatron-core that users cannot act on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch

OPTIONAL = (
    "(?s).*(Transformer Engine|Apex|apex|moe_ffn_hidden_size|full scope is deprecated|without fp32 routing|"
    "sequence parallelism must be used)"
)
RENAMED = r"`torch\.distributed\.\w+` is deprecated"


@contextlib.contextmanager
def silence_megatron() -> Iterator[None]:
    """Around imports of megatron-core and the making of its configs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OPTIONAL)
        yield


def silence_calls() -> None:
    """For the rest of the process: megatron-core calls collectives by names that torch has since changed,
    and gives a hint on CUDA's queues without CUDA too. A filter for good, since most of this happens in
    backward passes."""
    warnings.filterwarnings("ignore", message=RENAMED, category=FutureWarning)
    # Its sharded optimizer looks for gradients on views of parameters, where there are none.
    warnings.filterwarnings("ignore", message=r"The \.grad attribute", module=r"megatron\.core\.optimizer")
    if not torch.cuda.is_available():
        warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
