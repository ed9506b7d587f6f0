"""Attention by buckets and by ``varlen_attn``, against a mask written down token by token."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmmoe_pretrain.batch import AttentionBlocks
from mmmoe_pretrain.models import attend as attention
from mmmoe_pretrain.models.attend import AttentionPlan, attend_buckets, attend_varlen
from mmmoe_pretrain.models.attention import Attention, StreamPlan
from mmmoe_pretrain.moe.tokens import TokenInfo
from tests.moe.routing_inputs import NAMES

CPU = torch.device("cpu")
SIZE = 16
HEADS = [(2, 2), (4, 2), (3, 1)]  # of queries; of keys and values
# (tokens, those at the start that attend in both directions) of each block
STREAMS = {
    "bidirectional": [(3, 3), (9, 9), (1, 1), (9, 9)],
    "bidirectional, one length": [(5, 5), (5, 5)],
    "causal": [(3, 0), (9, 0), (1, 0), (9, 0)],
    "causal, in order": [(9, 0), (17, 0), (33, 0)],
    "prefixed behind": [(5, 5), (2, 2), (7, 4), (3, 1)],
    "prefixed between": [(7, 4), (5, 5), (20, 19), (1, 1)],
    "all prefixed": [(4, 2), (2, 1)],
    "of every kind": [(6, 0), (7, 4), (0, 0), (5, 5), (4, 0), (2, 2), (20, 1)],
    "long": [(130, 130), (300, 0), (3, 3), (257, 129), (128, 0), (140, 140)],
}


def plan_of(stream: list[tuple[int, int]], device: torch.device = CPU) -> AttentionPlan:
    lengths, full = (tuple(block[i] for block in stream) for i in range(2))
    return AttentionPlan(AttentionBlocks(lengths, full), device)


def allowed(stream: list[tuple[int, int]]) -> Tensor:
    """[n, n]: the sentences in ``AttentionBlocks``, by loops."""
    tokens = [(s, i, full) for s, (length, full) in enumerate(stream) for i in range(length)]
    return torch.tensor([
        [s == t and (j < full if i < full else j <= i) for t, j, _ in tokens] for s, i, full in tokens
    ])  # fmt: skip


def draw(
    stream: list[tuple[int, int]], heads: tuple[int, int] = (2, 2), dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values, and a gradient of the output."""
    n = sum(length for length, _ in stream)
    generator = torch.Generator().manual_seed(n)
    counts = heads[0], heads[1], heads[1], heads[0]
    q, k, v, grad = (torch.randn(n, count, SIZE, generator=generator).to(dtype) for count in counts)
    return [x.requires_grad_() for x in (q, k, v)], grad.flatten(1)


def run(function: Any, qkv: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = function(*qkv)
    return [out, *torch.autograd.grad(out, qkv, grad)]


def by_mask(stream: list[tuple[int, int]]) -> Any:
    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = [h * k.shape[1] // q.shape[1] for h in range(q.shape[1])]
        k, v = (torch.stack([x[:, h] for h in heads], dim=1) for x in (k, v))
        score = torch.einsum("qhd,khd->hqk", q, k) / SIZE**0.5
        p = score.masked_fill(~allowed(stream), float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", p, v).flatten(1)

    return dense


def varlen_in_pytorch(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``torch.nn.attention.varlen.varlen_attn`` where queries and keys have equal lengths, by a loop."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert window_size in {(-1, -1), (-1, 0)}
    assert enable_gqa or query.shape[1] == key.shape[1]
    ends = cu_seq_q.tolist()
    assert (ends[0], ends[-1]) == (0, query.shape[0])
    assert max(b - a for a, b in itertools.pairwise(ends)) == max_q == max_k
    parts = []
    for start, end in itertools.pairwise(ends):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=window_size == (-1, 0), enable_gqa=enable_gqa)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


def check(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)  # fp64, sums in another order


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", STREAMS)
def test_both_backends_attend_as_the_blocks_say(
    name: str, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_in_pytorch)
    stream = STREAMS[name]
    qkv, grad = draw(stream, heads)
    expected = run(by_mask(stream), qkv, grad)
    check(run(lambda *x: attend_buckets(*x, plan_of(stream).buckets), qkv, grad), expected)
    check(run(lambda *x: attend_varlen(*x, plan_of(stream).varlen), qkv, grad), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", STREAMS)
def test_no_bucket_falls_back_to_a_matrix_of_scores_on_a_cpu(name: str, dtype: torch.dtype) -> None:
    """torch raises where FlashAttention is the only kernel allowed and cannot compute a call."""
    qkv, grad = draw(STREAMS[name], (4, 2), dtype)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = run(lambda *x: attend_buckets(*x, plan_of(STREAMS[name]).buckets), qkv, grad)
    assert all(x.isfinite().all() for x in found)


def test_plans_of_long_blocks_are_small() -> None:
    """No call pads a block by more than 7 tokens, or takes numbers by the square of a length."""
    lengths, full = (32_768, 32_768, 32_763, 30_000), (0, 32_768, 32_763, 100)
    plan = AttentionPlan(AttentionBlocks(lengths, full), CPU)
    buckets = plan.buckets
    assert [(b.spans, b.length, b.causal) for b in buckets.buckets] == [
        (1, 100, False), (1, 30_000, True), (2, 32_768, False), (1, 32_768, True),
    ]  # fmt: skip
    masks = [b.mask_S11L for b in buckets.buckets if b.mask_S11L is not None]
    assert [mask.shape for mask in masks] == [(2, 1, 1, 32_768)]
    assert buckets.row_N.shape == (sum(lengths) + 100 + 5,)  # the prefix twice; 32,763 is padded to 32,768
    assert not buckets.in_order
    assert plan_of(STREAMS["causal, in order"]).buckets.in_order, "nothing has to be copied"
    bidirectional, causal = plan.varlen.calls
    assert (bidirectional.longest, causal.longest) == (32_768, 32_768)
    assert (bidirectional.first, bidirectional.last) == (32_768, sum(lengths))
    assert len(bidirectional.ends) == 1 + 3 + -(-29_900 // attention.DISCARDED_CHUNK)


def test_no_token_is_no_attention() -> None:
    q, k = torch.zeros(0, 4, SIZE), torch.zeros(0, 2, SIZE)
    assert attention.attend(q, k, k, plan_of([])).shape == (0, 4 * SIZE)


def test_nan_stays_in_its_block() -> None:
    """Forward and backward, though blocks share a call."""
    stream = [(5, 5), (7, 7), (3, 0), (6, 2)]
    qkv, grad = draw(stream, dtype=torch.float32)
    with torch.no_grad():
        for x in qkv:
            x[5:12] = float("nan")
    for found in run(lambda *x: attend_buckets(*x, plan_of(stream).buckets), qkv, grad):
        assert found.flatten(1).isfinite().all(dim=1).tolist() == [not 5 <= i < 12 for i in range(21)]


def test_grouped_queries_are_heads_whose_keys_and_values_are_alike() -> None:
    """A module with 2 heads of keys and values for 6 of queries, and one with 6 that repeats their weights."""
    stream, size = STREAMS["of every kind"], 24
    n = sum(length for length, _ in stream)
    grouped, whole = (Attention(size, 6, kv_heads).double() for kv_heads in (2, 6))
    angle_nh = torch.linspace(0, 3, 2 * n, dtype=torch.float64).view(n, 2)
    tokens = TokenInfo.of_modalities(torch.zeros(n, dtype=torch.int64), NAMES)
    plan = StreamPlan(tokens, angle_nh.cos(), angle_nh.sin(), plan_of(stream))
    rows = torch.arange((6 + 2 + 2) * 4).view(10, 4)  # of each head: queries, then keys, then values
    repeated = torch.cat([rows[:6], rows[[6, 6, 6, 7, 7, 7]], rows[[8, 8, 8, 9, 9, 9]]]).flatten()
    with torch.no_grad():
        whole.get_parameter("qkv.weight").copy_(grouped.get_parameter("qkv.weight")[repeated])
        whole.out.load_state_dict(grouped.out.state_dict())
    x = torch.randn(n, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    outs, gradients = [], []
    for module in (grouped, whole):
        outs.append(module(x, plan))
        gradients.append(torch.autograd.grad(outs[-1].square().sum(), [x, *module.parameters()]))
    of_x, of_qkv, of_out = gradients[1]
    expected = [outs[1], of_x, torch.zeros(40, size, dtype=torch.float64).index_add(0, repeated, of_qkv), of_out]
    check([outs[0], *gradients[0]], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", STREAMS)
def test_flash_attention_attends_as_the_blocks_say(name: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    stream, cuda = STREAMS[name], torch.device("cuda")
    qkv, grad = draw(stream, heads, dtype)
    expected = run(by_mask(stream), [x.detach().double().requires_grad_() for x in qkv], grad.double())
    on_gpu = [x.detach().to(cuda).requires_grad_() for x in qkv]
    assert attention._varlen_fits(on_gpu[0])
    found = run(lambda *x: attention.attend(*x, plan_of(stream, cuda)), on_gpu, grad.to(cuda))
    for ours, reference in zip(found, expected, strict=True):
        # Probabilities and outputs are rounded to 8 bits of mantissa in bfloat16, 11 in float16.
        torch.testing.assert_close(ours.cpu().double(), reference, rtol=0.02, atol=0.02)
