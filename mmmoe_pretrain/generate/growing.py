"""What decoding reads and makes: sequences that grow, what may stand behind them, and what was generated.

Shapes: S sequences, R of them that are kept, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Growing(Protocol):
    """See ``sequences.Sequences``."""

    logits_SV: Tensor

    def append(self, ids_S: Tensor) -> None: ...

    def select(self, rows_R: Tensor) -> None: ...


@dataclass(frozen=True)
class Ahead:
    """What may be generated behind each sequence. ``keys``: names that random draws depend on. ``limits``: tokens at
    most, without the end mark. ``end``: the end mark. ``allowed_V``: bool."""

    keys: tuple[str, ...]
    limits: tuple[int, ...]
    end: int
    allowed_V: Tensor

    def log_p(self, logits_SV: Tensor) -> Tensor:
        """[S, V], -inf of tokens that are not allowed."""
        return logits_SV.masked_fill(~self.allowed_V, -torch.inf).log_softmax(-1)


@dataclass(frozen=True)
class Generated:
    """``ids``: without the end mark. ``log_probability``: of all of them and of the end mark, where it ``ended``."""

    ids: tuple[int, ...]
    log_probability: float
    ended: bool
