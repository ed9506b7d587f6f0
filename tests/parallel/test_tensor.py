"""What leaves and enters tensor parallelism, on two ranks, by hand. The matrices and the vocabulary are compared with
plain torch in whole blocks and models (tests/models/test_tensor_parallel.py)."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.parallel.tensor import (
    column_linear,
    enter_parts,
    enter_trunk,
    leave_parts,
    leave_trunk,
    row_linear,
    sum_gradients,
    vocab_embedding,
    vocab_head,
)
from tests.distributed import groups_of, run_ranks

D, HIDDEN, VOCAB, RANKS = 8, 12, 10, 2
TOKENS = (0, 1, 2, 7)  # 1 and 7 leave a padding row on one of two ranks
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # sums of a few fp32 terms near 10 in another order


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_parts(groups: Groups, tokens: int) -> None:
    """y = (2 r + 3) x + w x over ranks r, plus 5 x that each computes alike; the derivatives by hand."""
    rank = groups.tensor_rank
    x, w = draw(tokens, tokens, D).requires_grad_(), draw(5, tokens, 1).requires_grad_()
    alike, parts = enter_parts(enter_trunk(x, groups), tokens, groups)
    share = sum_gradients(w, groups) * parts * (0.25 if rank else 0.75)  # the parts make w x
    y = leave_trunk(leave_parts((2 * rank + 3) * parts + share, groups), tokens, groups)
    torch.testing.assert_close(y, (3 + 5 + w) * x, **CLOSE)
    # a loss term that all ranks compute equally, of a gradient without strides
    (y.sum() + 5 * alike.sum()).backward()
    assert x.grad is not None and w.grad is not None
    torch.testing.assert_close(x.grad, (3 + 5 + 5 + w).expand(tokens, D).detach(), **CLOSE)
    torch.testing.assert_close(w.grad, x.sum(1, keepdim=True).detach(), **CLOSE)


def check_rows(groups: Groups) -> None:
    """7 tokens: rank 0 holds the first four, rank 1 three and a zero row."""
    x = draw(1, 7, D)
    rows = enter_trunk(x, groups)
    expected = F.pad(x, (0, 0, 0, 1)).chunk(2)[groups.tensor_rank] if groups.sequence_parallel else x
    assert torch.equal(rows, expected)
    assert torch.equal(leave_trunk(rows, 7, groups), x)


def all_cases() -> None:
    with process_group(timeout_minutes=0.5):
        for sequence_parallel in (False, True):
            groups = groups_of(ParallelConfig(tensor_parallel_size=RANKS, sequence_parallel=sequence_parallel), 4)
            for tokens in TOKENS:
                check_parts(groups, tokens)
            check_rows(groups)
            destroy_groups()


def test_parts_and_rows_of_two_tensor_ranks_make_the_whole() -> None:
    run_ranks(RANKS, all_cases)


def test_one_tensor_rank_is_plain_torch_without_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mmmoe_pretrain.parallel.megatron_layers", "megatron.core.tensor_parallel"):
        monkeypatch.setitem(sys.modules, name, None)  # an import then raises
    assert type(column_linear(D, HIDDEN, SINGLE, blocks=(1, 1, 1))) is nn.Linear
    assert type(row_linear(HIDDEN, D, SINGLE)) is nn.Linear
    assert type(vocab_head(D, VOCAB, SINGLE)) is nn.Linear
    assert type(vocab_embedding(VOCAB, D, SINGLE)) is nn.Embedding
    x = draw(1, 3, D)
    for same in (
        enter_trunk(x, SINGLE),
        leave_trunk(x, 3, SINGLE),
        leave_parts(x, SINGLE),
        *enter_parts(x, 3, SINGLE),
    ):
        assert same is x
