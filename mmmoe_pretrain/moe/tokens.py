"""What an MoE layer may know of the tokens of a stream beside their content."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config.base import ONE_STREAM, StreamNames


@dataclass(frozen=True)
class TokenInfo:
    """Modality, task, segment and identity of each of the n valid tokens, all int64 [n].

    ``keys_n`` is the id of a discrete token, and the number in its item of any other, for hash routing.
    ``draw`` numbers the forward passes of an optimizer step: random numbers of a router depend on it, so that a
    recomputed pass repeats its draws. ``names``: of the modalities, tasks and combinations. ``combination_ids_n``: as
    ``Batch.combination_ids``.
    """

    modality_ids_n: Tensor
    task_ids_n: Tensor
    segment_ids_n: Tensor
    keys_n: Tensor
    names: StreamNames
    draw: int = 0
    combination_ids_n: Tensor | None = None

    @classmethod
    def of_modalities(cls, modality_ids_n: Tensor, names: StreamNames = ONE_STREAM) -> TokenInfo:
        """Tokens of one segment of the first task, each its own key; for layers used by themselves."""
        zeros = torch.zeros_like(modality_ids_n)
        return cls(modality_ids_n, zeros, zeros, torch.arange(zeros.numel(), device=zeros.device), names)

    @property
    def num_tokens(self) -> int:
        return self.modality_ids_n.shape[0]


def token_info(batch: Batch, names: StreamNames, draw: int = 0) -> TokenInfo:
    """The valid tokens of a packed batch."""
    n = batch.num_valid
    segment_ids_n = batch.segment_ids[:n]
    of_segment_n, combination_ids = batch.task_ids[segment_ids_n], batch.combination_ids
    combination_ids_n = None if combination_ids is None else combination_ids[:n]
    return TokenInfo(
        batch.modality_ids[:n], of_segment_n, segment_ids_n, batch.keys[:n], names, draw, combination_ids_n
    )
