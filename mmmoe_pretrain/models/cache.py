"""Keys and values of the tokens that sequences have so far, so that one more token attends to them and they are not
computed again.

Shapes: S sequences, L tokens of the longest with those still to come, H heads of queries, G of keys and values,
d head size, n tokens of all sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.batch import AttentionBlocks, send
from mmmoe_pretrain.models.attend import AttentionPlan, attend, heads_that_fit


class KeyValueCache:
    """Of every attention layer. The first pass is over a packed stream, one block a sequence, and fills it. Each
    later one is over one new token of every sequence, and begins with ``advance``. A new token attends to all tokens
    of its sequence, as the last one of a block does in a packed stream."""

    def __init__(self, blocks: AttentionBlocks, room: int, device: torch.device) -> None:
        """``room``: tokens that may be appended to each sequence."""
        lengths = torch.tensor(blocks.lengths, dtype=torch.int64)
        starts = lengths.cumsum(0) - lengths
        row_n = torch.arange(len(lengths)).repeat_interleave(lengths)
        self._length_S, self._row_n = send(lengths, device), send(row_n, device)
        self._place_n = send(torch.arange(len(row_n)) - starts[row_n], device)
        self._used = max(blocks.lengths, default=0)  # tokens of the longest, known on the host
        self._size = self._used + room
        self._mask_S11L: Tensor | None = None
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # by layer: keys and values [S, G, L, d]

    def advance(self) -> None:
        """The next pass appends a token to every sequence."""
        assert self._used < self._size, f"a cache of {self._size} tokens is full"
        self._row_n, self._place_n = torch.arange(len(self._length_S), device=self._length_S.device), self._length_S
        self._length_S, self._used = self._length_S + 1, self._used + 1
        is_there_SL = torch.arange(self._used, device=self._length_S.device) < self._length_S[:, None]
        self._mask_S11L = is_there_SL[:, None, None]

    def select(self, rows_R: Tensor) -> None:
        """Keep these sequences, in this order; a sequence may be kept several times."""
        self._length_S = self._length_S.index_select(0, rows_R)
        self._kept = {
            layer: (keys.index_select(0, rows_R), values.index_select(0, rows_R))
            for layer, (keys, values) in self._kept.items()
        }

    def attend(self, layer: nn.Module, q_nHd: Tensor, k_nGd: Tensor, v_nGd: Tensor, plan: AttentionPlan) -> Tensor:
        """As ``attend.attend``, of the tokens of this pass, whose keys and values are kept: [n, H d]. ``plan``: of
        the first pass."""
        first = layer not in self._kept
        if first:
            shape = (len(self._length_S), k_nGd.shape[1], self._size, k_nGd.shape[2])
            self._kept[layer] = k_nGd.new_zeros(shape), v_nGd.new_zeros(shape)
        keys, values = self._kept[layer]
        keys[self._row_n, :, self._place_n] = k_nGd
        values[self._row_n, :, self._place_n] = v_nGd
        if first:
            return attend(q_nHd, k_nGd, v_nGd, plan)
        keys, values, shares_heads = heads_that_fit(q_nHd, keys[:, :, : self._used], values[:, :, : self._used])
        out_SH1d = F.scaled_dot_product_attention(
            q_nHd[:, :, None], keys, values, attn_mask=self._mask_S11L, enable_gqa=shares_heads
        )
        return out_SH1d.flatten(1)
