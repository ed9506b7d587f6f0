"""Cross-attention of packed rows: each run of query rows attends to a run of other rows. Runs of like lengths share a
call, as in ``models/attend.py``, so there is no mask of L x L.

A transformer block of it, for fusion modules: plain torch, equal on every tensor rank.

Shapes: q query rows, n rows that are attended to, H heads, d head size, S runs of a bucket, Q and L their padded
lengths, N and M rows of all buckets.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.batch import Spans, send
from mmmoe_pretrain.models.attend import LENGTH_MULTIPLE
from mmmoe_pretrain.models.attention import EPS

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class CrossBucket:
    """``mask_S11L``: True for rows that are attended to, False for padding; None where there is none."""

    runs: int
    queries: int
    keys: int
    mask_S11L: Tensor | None


@dataclass(frozen=True)
class CrossPlan:
    """The concatenated buckets. ``query_N`` and ``key_M``: the rows of each, padded with the last one of the run.
    ``place_q``: where the output of a query row is computed; behind all others for one that attends to nothing."""

    buckets: tuple[CrossBucket, ...]
    query_N: Tensor
    key_M: Tensor
    place_q: Tensor


def plan_cross(query_lengths: Sequence[int], key_lengths: Sequence[int], device: torch.device) -> CrossPlan:
    """Of runs that follow each other from row 0 on: run i of the queries attends to run i of the others."""
    of_queries, of_keys = (np.asarray(lengths, dtype=np.int64) for lengths in (query_lengths, key_lengths))
    start_of_queries, start_of_keys = (np.cumsum(lengths) - lengths for lengths in (of_queries, of_keys))
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in np.flatnonzero((of_queries > 0) & (of_keys > 0)).tolist():
        found[-(-query_lengths[i] // LENGTH_MULTIPLE), -(-key_lengths[i] // LENGTH_MULTIPLE)].append(i)
    buckets, query_rows, key_rows, counts = [], [_NONE], [_NONE], [_NONE.astype(bool)]
    for _, runs in sorted(found.items()):
        rows_SQ, counts_SQ = _padded(start_of_queries[runs], of_queries[runs])
        rows_SL, valid_SL = _padded(start_of_keys[runs], of_keys[runs])
        query_rows.append(rows_SQ.ravel())
        counts.append(counts_SQ.ravel())
        key_rows.append(rows_SL.ravel())
        mask = None if valid_SL.all() else send(torch.from_numpy(valid_SL[:, None, None]), device)
        buckets.append(CrossBucket(len(runs), rows_SQ.shape[1], rows_SL.shape[1], mask))
    query_N, key_M, counts_N = (np.concatenate(arrays) for arrays in (query_rows, key_rows, counts))
    place_q = np.full(of_queries.sum(), len(query_N), dtype=np.int64)
    place_q[query_N[counts_N]] = np.flatnonzero(counts_N)
    return CrossPlan(tuple(buckets), *(send(torch.from_numpy(rows), device) for rows in (query_N, key_M, place_q)))


def _padded(start_S: np.ndarray, length_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of runs, [S, L], padded with the last one of each; and which are no padding."""
    within_L, length_S1 = np.arange(length_S.max()), length_S[:, None]
    return start_S[:, None] + np.minimum(within_L, length_S1 - 1), within_L < length_S1


def attend_cross(q_qHd: Tensor, k_nHd: Tensor, v_nHd: Tensor, plan: CrossPlan) -> Tensor:
    """[q, H d]; zero for rows that attend to nothing."""
    sizes = [(bucket.runs * bucket.queries, bucket.runs * bucket.keys) for bucket in plan.buckets]
    queries = q_qHd.index_select(0, plan.query_N).split([query for query, _ in sizes])
    k, v = (x.index_select(0, plan.key_M).split([key for _, key in sizes]) for x in (k_nHd, v_nHd))
    outs = [_attend_bucket(*given) for given in zip(plan.buckets, queries, k, v, strict=True)]
    nothing = q_qHd.new_zeros(1, *q_qHd.shape[1:]) + sum(x[:0].sum() for x in (q_qHd, k_nHd, v_nHd))
    return torch.cat([*outs, nothing]).index_select(0, plan.place_q).flatten(1)


def _attend_bucket(bucket: CrossBucket, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(0, (bucket.runs, -1)).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bucket.mask_S11L)
    return out.transpose(1, 2).flatten(0, 1)


class CrossBlock(nn.Module):
    """A pre-norm transformer block: x + attention of x to y, then x + MLP(x). Queries and keys are normalised per
    head as in the trunk's attention; the MLP has one hidden layer of D numbers (GELU)."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.heads = (num_heads, hidden_size // num_heads)
        self.query, self.key, self.value, self.out, self.up, self.down = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(6)
        )

    def forward(self, x_qD: Tensor, y_nD: Tensor, plan: CrossPlan) -> Tensor:
        y_nD = _unit(y_nD)
        q, k, v = (
            linear(rows).unflatten(1, self.heads)
            for linear, rows in ((self.query, _unit(x_qD)), (self.key, y_nD), (self.value, y_nD))
        )
        x_qD = x_qD + self.out(attend_cross(_unit(q), _unit(k), v, plan))
        return x_qD + self.down(F.gelu(self.up(_unit(x_qD))))


def _unit(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def tokens_of(x_nD: Tensor, spans_P: Sequence[Spans]) -> tuple[Tensor, list[int]]:
    """The rows of the stream that belong to the parts ``spans_P``, sample by sample; and how many each sample has."""
    starts_BP, lengths_BP = (
        np.array([getattr(spans, name) for spans in spans_P], dtype=np.int64).T for name in ("starts", "lengths")
    )
    lengths = lengths_BP.ravel()
    skipped = starts_BP.ravel() - (np.cumsum(lengths) - lengths)  # rows of the stream before a run, less those kept
    rows = np.arange(lengths.sum()) + np.repeat(skipped, lengths)
    return x_nD.index_select(0, send(torch.from_numpy(rows), x_nD.device)), lengths_BP.sum(axis=1).tolist()


def means_of(x_qD: Tensor, lengths: Sequence[int]) -> Tensor:
    """[B, D]: the means of runs of rows that follow each other; zero of a run of none."""
    length_B = np.asarray(lengths, dtype=np.int64)
    sample_q = send(torch.from_numpy(np.repeat(np.arange(len(length_B)), length_B)), x_qD.device)
    total_BD = x_qD.new_zeros(len(length_B), x_qD.shape[1]).index_add(0, sample_q, x_qD)
    return total_BD / send(torch.from_numpy(np.maximum(length_B, 1)), x_qD.device)[:, None]
