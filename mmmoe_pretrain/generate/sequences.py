"""Sequences that grow by one token at a time: a packed prefix is encoded once, then each new token is computed alone,
by the keys and values that are kept of those before it.

The logits are those of the forward pass of training, to rounding. There a token's experts depend on it alone, unless
experts have a capacity: then other tokens of the batch can displace it. Here none is displaced (``dropless``).

Shapes: S sequences, R of them that are kept, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mmmoe_pretrain.batch import OF_TOKENIZER, Batch, send
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.models.cache import KeyValueCache
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.moe.tokens import TokenInfo, token_info


@contextmanager
def dropless(model: MMMoE) -> Iterator[None]:
    """Experts take every token that is sent to them, whatever their capacity in training."""
    kept = [router.config for router in model.routers]
    for router in model.routers:
        router.config = router.config.model_copy(update={"capacity_factor": None})
    try:
        yield
    finally:
        for router, config in zip(model.routers, kept, strict=True):
            router.config = config


class Sequences:
    """One for each segment of a batch, whose last part is a beginning of a value of ``modality``. ``logits_SV``:
    fp32, of the token that follows each."""

    def __init__(
        self, model: MMMoE, task: str, batch: Batch, modality: Modality, places: Sequence[int], room: int
    ) -> None:
        """``places``: the number of tokens that each value has so far. ``room``: tokens that may be appended."""
        assert model.stage.first and model.stage.last and model.groups.tensor_size == 1, (
            "generation is of one process"
        )
        device = next(model.parameters()).device
        batch = batch.to(device)
        self._model, self._task, self._modality = model, task, modality
        self._cache = KeyValueCache(batch.attention, room, device)
        x_nD, _ = model.run_stage(batch, None, self._cache)
        last_S = send(torch.tensor(batch.attention.lengths, dtype=torch.int64).cumsum(0) - 1, device)
        self._place_S = send(torch.tensor(places, dtype=torch.int64), device)
        self._position_S = batch.positions.index_select(0, last_S) + 1
        self._tokens = _rows(token_info(batch, model.names), last_S)
        self.logits_SV = self._logits(x_nD.index_select(0, last_S))

    def append(self, ids_S: Tensor) -> None:
        """Append a token to every sequence."""
        inputs = self._modality.token_inputs(ids_S, self._place_S)
        tokens = dataclasses.replace(self._tokens, keys_n=ids_S)
        x_SD = self._model.append(self._modality.name, inputs, tokens, self._position_S, self._cache)
        self._place_S, self._position_S = self._place_S + 1, self._position_S + 1
        self.logits_SV = self._logits(x_SD)

    def _logits(self, x_SD: Tensor) -> Tensor:
        own = self._modality.settings.vocabulary
        return self._model.token_logits(self._task, x_SD, self._modality.name if own else OF_TOKENIZER)

    def select(self, rows_R: Tensor) -> None:
        """Keep these sequences, in this order; a sequence may be kept several times."""
        self._cache.select(rows_R)
        self._tokens = _rows(self._tokens, rows_R)
        self._place_S, self._position_S, self.logits_SV = (
            tensor.index_select(0, rows_R) for tensor in (self._place_S, self._position_S, self.logits_SV)
        )


def _rows(info: TokenInfo, rows_R: Tensor) -> TokenInfo:
    def of(ids_n: Tensor) -> Tensor:
        return ids_n.index_select(0, rows_R)

    combinations = None if info.combination_ids_n is None else of(info.combination_ids_n)
    return TokenInfo(
        of(info.modality_ids_n), of(info.task_ids_n), of(info.segment_ids_n), of(info.keys_n), info.names,
        combination_ids_n=combinations,
    )  # fmt: skip
