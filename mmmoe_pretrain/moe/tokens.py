"""What a mixture layer may know of the tokens of a stream beside their content."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmmoe_pretrain.batch import MODALITY_ID, Batch


@dataclass(frozen=True)
class TokenInfo:
    """Of each of the n valid tokens: its modality, its task, its segment, and an identity.

    ``keys_n`` is the id of a text token, and the position of any other: what hash routing goes by.
    All int64 [n]. ``draw`` numbers the forward passes of an optimizer step: what is random in a router
    goes by it, so that a recomputed pass repeats its draws.
    """

    modality_ids_n: Tensor
    task_ids_n: Tensor
    segment_ids_n: Tensor
    keys_n: Tensor
    draw: int = 0

    @classmethod
    def of_modalities(cls, modality_ids_n: Tensor) -> TokenInfo:
        """Tokens of one segment of the first task, each its own key; for layers used by themselves."""
        zeros = torch.zeros_like(modality_ids_n)
        return cls(modality_ids_n, zeros, zeros, torch.arange(zeros.numel(), device=zeros.device))

    @property
    def num_tokens(self) -> int:
        return self.modality_ids_n.shape[0]

    def slice(self, start: int, end: int) -> TokenInfo:
        """Tokens ``start`` to ``end``."""
        return TokenInfo(
            self.modality_ids_n[start:end],
            self.task_ids_n[start:end],
            self.segment_ids_n[start:end],
            self.keys_n[start:end],
            self.draw,
        )


def token_info(batch: Batch, draw: int = 0) -> TokenInfo:
    """The valid tokens of a packed batch; a fused segment is for captioning, the others for contrast."""
    num_valid = batch.num_valid
    segment_ids_n = batch.segment_ids[:num_valid]
    fused_S = (batch.pool_sample < 0).to(torch.int64)  # TASKS: contrastive, captioning
    text = MODALITY_ID["text"]
    keys_n = batch.positions[:num_valid].clone()
    keys_n[batch.rows[text]] = batch.text_ids.index_select(0, batch.source[text])
    return TokenInfo(batch.modality_ids[:num_valid], fused_S[segment_ids_n], segment_ids_n, keys_n, draw)
