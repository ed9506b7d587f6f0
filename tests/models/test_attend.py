"""Attention by buckets and by ``varlen_attn``, against a mask written down token by token."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmmoe_pretrain.batch import Segments
from mmmoe_pretrain.models import attend as attention
from mmmoe_pretrain.models.attend import AttentionPlan, attend_buckets, attend_varlen, bucket_length

CPU = torch.device("cpu")
HEADS, SIZE = 2, 16
# (tokens, tokens of the prefix) of each segment
STREAMS = {
    "unimodal": [(3, 0), (9, 0), (1, 0), (9, 0)],
    "prefixed behind": [(5, 0), (2, 0), (7, 4), (3, 1)],
    "prefixed between": [(7, 4), (5, 0), (20, 19), (1, 0)],
    "all prefixed": [(4, 2), (2, 1)],
}


def plan_of(stream: list[tuple[int, int]], device: torch.device = CPU) -> AttentionPlan:
    lengths, prefixes = (tuple(segment[i] for segment in stream) for i in range(2))
    return AttentionPlan(Segments(lengths, prefixes), device)


def allowed(stream: list[tuple[int, int]]) -> Tensor:
    """[n, n]: the sentence in ``Segments``, by loops."""
    tokens = [(s, i, prefix) for s, (length, prefix) in enumerate(stream) for i in range(length)]
    return torch.tensor([
        [s == t and (prefix == 0 or j < prefix or j <= i) for t, j, _ in tokens] for s, i, prefix in tokens
    ])  # fmt: skip


def draw(stream: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values, and a gradient of the output."""
    n = sum(length for length, _ in stream)
    generator = torch.Generator().manual_seed(n)
    qkv = [torch.randn(n, HEADS, SIZE, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
    return qkv, torch.randn(n, HEADS * SIZE, generator=generator).to(dtype)


def run(function: Any, qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = function(*qkv)
    return [out, *torch.autograd.grad(out, qkv, grad)]


def by_mask(stream: list[tuple[int, int]]) -> Any:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed(stream).to(q.device))
        return out.transpose(0, 1).flatten(1)

    return dense


def varlen_in_pytorch(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, window_size: tuple[int, int] = (-1, -1),
) -> Tensor:  # fmt: skip
    """``torch.nn.attention.varlen.varlen_attn`` where queries and keys have equal lengths, by a loop."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert window_size in {(-1, -1), (-1, 0)}
    ends = cu_seq_q.tolist()
    assert (ends[0], ends[-1]) == (0, query.shape[0])
    assert max(b - a for a, b in itertools.pairwise(ends)) == max_q == max_k
    parts = []
    for start, end in itertools.pairwise(ends):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=window_size == (-1, 0)).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("name", STREAMS)
def test_buckets_attend_as_the_segments_say(name: str) -> None:
    stream = STREAMS[name]
    qkv, grad = draw(stream)
    expected = run(by_mask(stream), qkv, grad)
    for ours, reference in zip(
        run(lambda *x: attend_buckets(*x, *plan_of(stream).buckets), qkv, grad), expected, strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)  # fp64, sums in another order


@pytest.mark.parametrize("name", STREAMS)
def test_varlen_is_told_what_the_segments_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_in_pytorch)
    stream = STREAMS[name]
    qkv, grad = draw(stream)
    expected = run(by_mask(stream), qkv, grad)
    for ours, reference in zip(
        run(lambda *x: attend_varlen(*x, plan_of(stream).varlen), qkv, grad), expected, strict=True
    ):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


def test_no_token_is_no_attention() -> None:
    empty = torch.zeros(0, HEADS, SIZE)
    assert attention.attend(empty, empty, empty, plan_of([])).shape == (0, HEADS * SIZE)


def test_a_bucket_by_hand() -> None:
    buckets, place_n = plan_of([(4, 0), (2, 0), (7, 4)]).buckets
    both, prefixed = buckets  # all of them are at most 8 long
    assert both.rows_SL.tolist() == [[0, 1, 2, 3, 0, 0, 0, 0], [4, 5, 0, 0, 0, 0, 0, 0]]
    assert both.valid_SL[1].tolist() == [True] * 2 + [False] * 6
    expected = torch.eye(8, dtype=torch.bool)
    expected[:2, :2] = True
    assert torch.equal(both.mask_SLL[1], expected)
    written_out = [
        "11110000",  # the prefix sees the prefix
        "11110000",
        "11110000",
        "11110000",
        "11111000",  # the text sees the prefix and what came before
        "11111100",
        "11111110",
        "00000001",  # padding sees itself
    ]
    assert [["0", "1"][x] for row in prefixed.mask_SLL[0].tolist() for x in row] == list("".join(written_out))
    assert place_n.tolist() == [0, 1, 2, 3, 8, 9, *range(16, 23)]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1, 8), (8, 8), (9, 16), (17, 24), (25, 32), (33, 48), (49, 64), (65, 96), (97, 128), (129, 192)],
)
def test_bucket_lengths(length: int, expected: int) -> None:
    assert bucket_length(np.array([length])).tolist() == [expected]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", STREAMS)
def test_flash_attention_attends_as_the_segments_say(name: str, dtype: torch.dtype) -> None:
    stream, cuda = STREAMS[name], torch.device("cuda")
    qkv, grad = draw(stream, dtype)
    expected = run(by_mask(stream), [x.detach().double().requires_grad_() for x in qkv], grad.double())
    on_gpu = [x.detach().to(cuda).requires_grad_() for x in qkv]
    assert attention._varlen_fits(on_gpu[0])
    found = run(lambda *x: attention.attend(*x, plan_of(stream, cuda)), on_gpu, grad.to(cuda))
    for ours, reference in zip(found, expected, strict=True):
        # Probabilities and outputs are rounded to 8 bits of mantissa in bfloat16, 11 in float16.
        torch.testing.assert_close(ours.cpu().double(), reference, rtol=0.02, atol=0.02)
