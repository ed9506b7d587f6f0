"""Tensor and sequence parallelism: matrices cut over the ranks of ``groups.tensor``.

A column-parallel matrix gives each rank a share of its outputs, a row-parallel one takes each rank's
share and sums the products (Megatron-LM, arXiv 1909.08053). Under sequence parallelism (arXiv 2205.05198)
what lies between is divided by tokens: rank r holds the r-th of equal runs of rows, and zero rows at the
end make the runs equal. Then the sum leaves by reduce-scatter and comes back by all-gather.

With one tensor rank all of this is plain torch, and megatron-core is not imported.

Shapes: n tokens of the stream, t rows of this rank (n, or its share of them), N targets, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.parallel.collectives import all_reduce_sum
from mmmoe_pretrain.parallel.cuts import divides_tokens
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.runtime import silence_megatron


def _layers() -> Any:
    """megatron-core's layers, imported where there are several tensor ranks alone: that takes seconds."""
    with silence_megatron():
        from mmmoe_pretrain.parallel import megatron_layers
    return megatron_layers


def column_linear(in_size: int, out_size: int, groups: Groups, blocks: tuple[int, ...] = (1,)) -> nn.Module:
    """[t, in] -> [n and padding, this rank's share of out]. ``blocks``: see ``Cut``."""
    if groups.tensor_size == 1:
        return nn.Linear(in_size, out_size, bias=False)
    return _layers().ColumnLinear(in_size, out_size, groups, blocks, divides_tokens(groups))


def row_linear(in_size: int, out_size: int, groups: Groups) -> nn.Module:
    """[n and padding, this rank's share of in] -> [t, out], summed over the tensor ranks."""
    if groups.tensor_size == 1:
        return nn.Linear(in_size, out_size, bias=False)
    return _layers().RowLinear(in_size, out_size, groups)


def vocab_embedding(vocab_size: int, hidden_size: int, groups: Groups) -> nn.Module:
    """ids [n] -> [n, D], on every tensor rank; each holds a share of the table's rows."""
    if groups.tensor_size == 1:
        return nn.Embedding(vocab_size, hidden_size)
    return _layers().VocabEmbedding(vocab_size, hidden_size, groups)


def vocab_head(hidden_size: int, vocab_size: int, groups: Groups) -> nn.Module:
    """[N, D], equal on every tensor rank -> this rank's share of the logits [N, V]."""
    if groups.tensor_size == 1:
        return nn.Linear(hidden_size, vocab_size, bias=False)
    return _layers().ColumnLinear(hidden_size, vocab_size, groups, blocks=(1,), sequence_parallel=False)


def vocab_cross_entropy(logits_NV: Tensor, targets_N: Tensor, groups: Groups) -> Tensor:
    """[N] fp32 negative log-likelihoods (nats), equal on every tensor rank.

    ``logits_NV``: fp32, this rank's columns; with several tensor ranks they are overwritten.
    """
    if groups.tensor_size == 1:
        return F.cross_entropy(logits_NV, targets_N, reduction="none")
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return vocab_parallel_cross_entropy(logits_NV, targets_N)


def enter_trunk(x_nD: Tensor, groups: Groups) -> Tensor:
    """[n, D], equal on every tensor rank -> this rank's rows [t, D]."""
    if not divides_tokens(groups):
        return x_nD
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    return scatter_to_sequence_parallel_region(pad_rows(x_nD, groups), group=groups.tensor)


def leave_trunk(x_tD: Tensor, num_valid: int, groups: Groups) -> Tensor:
    """The inverse of ``enter_trunk``: [t, D] -> [n, D]. What follows must be computed equally on every
    tensor rank: its gradient is taken as it is, without a sum."""
    if not divides_tokens(groups):
        return x_tD
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    whole = gather_from_sequence_parallel_region(x_tD, tensor_parallel_output_grad=False, group=groups.tensor)
    return whole[:num_valid]


def pad_rows(x_nF: Tensor, groups: Groups) -> Tensor:
    """Zero rows at the end up to a multiple of the tensor ranks, where tokens are divided."""
    missing = -x_nF.shape[0] % groups.tensor_size if divides_tokens(groups) else 0
    return F.pad(x_nF, (0, 0, 0, missing)) if missing else x_nF


def enter_parts(x_tD: Tensor, num_valid: int, groups: Groups) -> tuple[Tensor, Tensor]:
    """All tokens [n, D] twice: for a computation that is equal on every tensor rank, and for one of
    which each makes a part. Either gradient comes out as one process would compute it."""
    if not divides_tokens(groups):
        return x_tD, sum_gradients(x_tD, groups)
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    x_nD = gather_from_sequence_parallel_region(x_tD, group=groups.tensor)[:num_valid]
    alike = x_nD.view_as(x_nD)
    if alike.requires_grad:  # the backward pass of the gather sums, and every rank has this gradient whole
        alike.register_hook(lambda grad: grad / groups.tensor_size)
    return alike, x_nD


def leave_parts(y_nD: Tensor, groups: Groups) -> Tensor:
    """The sum of the parts [n, D] of all tensor ranks: [t, D]."""
    if not divides_tokens(groups):
        return all_reduce_sum(y_nD, groups.tensor, backward=False)
    from megatron.core.tensor_parallel import reduce_scatter_to_sequence_parallel_region

    return reduce_scatter_to_sequence_parallel_region(pad_rows(y_nD, groups), group=groups.tensor)


def sum_gradients(x: Tensor, groups: Groups) -> Tensor:
    """x; its gradient is summed over the tensor ranks, each of which knows a part of it."""
    return all_reduce_sum(x, groups.tensor, forward=False)
