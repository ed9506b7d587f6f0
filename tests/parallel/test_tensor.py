"""The tensor-parallel matrices and vocabulary parts on two ranks against plain torch in one process.

Every case runs in one process group; a rank compares its part with the same part of the whole.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.placement import part_of, placements
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.parallel.tensor import (
    column_linear,
    enter_parts,
    enter_trunk,
    leave_parts,
    leave_trunk,
    pad_rows,
    row_linear,
    sum_gradients,
    vocab_cross_entropy,
    vocab_embedding,
    vocab_head,
)
from tests.distributed import groups_of, run_ranks

D, HIDDEN, VOCAB, RANKS = 8, 12, 10, 2
TOKENS = (0, 1, 2, 7)  # 1 and 7 leave a padding row on one of two ranks


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Beside the largest value: two parts of sums of at most 24 terms, added in another order in fp32;
    and in bf16 one rounding more of each part, of their sum, and of a gradient (2^-9 each) than in the
    reference, which is in bf16 too."""
    assert found.shape == expected.shape, f"{what}: {found.shape}, expected {expected.shape}"
    assert found.dtype == expected.dtype, what
    bound = 6 * 2**-9 if found.dtype == torch.bfloat16 else 32 * 2**-24
    if expected.numel():
        worst = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        assert worst < bound, f"{what}: {worst:.1e} of the largest value, bound {bound:.1e}"


class TwoMatrices(nn.Module):
    """Rows in, rows out, as a feed-forward layer without its non-linearity; three blocks in between."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.groups = groups
        self.first = column_linear(D, 3 * HIDDEN, groups, blocks=(1, 1, 1))
        self.second = row_linear(HIDDEN, D, groups)

    def forward(self, x_nD: Tensor) -> Tensor:
        n = x_nD.shape[0]
        a, b, c = self.first(enter_trunk(x_nD, self.groups))[:n].chunk(3, dim=-1)
        return leave_trunk(self.second(pad_rows(a * b + c, self.groups)), n, self.groups)


class Vocabulary(nn.Module):
    """ids -> rows of the table -> negative log-likelihood of ``targets``."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        self.groups = groups
        self.table = vocab_embedding(VOCAB, D, groups)
        self.head = vocab_head(D, VOCAB, groups)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.table(ids)
        return rows, vocab_cross_entropy(self.head(rows.square()).float(), targets, self.groups)


def give_values(module: nn.Module) -> None:
    """Every layout gets its parts of the same matrices."""
    cuts = placements(module)
    for seed, (name, parameter) in enumerate(module.named_parameters()):
        shape = list(parameter.shape)
        for cut in cuts[name]:
            shape[cut.dim] *= cut.parts
        parameter.data.copy_(part_of(draw(seed, *shape) / D**0.5, cuts[name]))


def make(kind: type[nn.Module], groups: Groups, dtype: torch.dtype = torch.float32) -> nn.Module:
    module = kind(groups)
    give_values(module)
    for parameter in module.parameters():  # as PretrainingModel.use_half does it
        parameter.data = parameter.data.to(dtype)
    return module


def check_gradients(cut: nn.Module, whole: nn.Module, what: str) -> None:
    of_whole = dict(whole.named_parameters())
    for name, placement in placements(cut).items():
        parameter = cut.get_parameter(name)
        assert placement and parameter.tensor_model_parallel, f"{what}: {name} is not marked as cut"
        assert parameter.grad is not None and of_whole[name].grad is not None
        check_close(parameter.grad, part_of(of_whole[name].grad, placement), f"{what}: gradient of {name}")


def check_matrices(groups: Groups, tokens: int, dtype: torch.dtype) -> None:
    found: list[tuple[Tensor, Tensor]] = []
    modules = [make(TwoMatrices, g, dtype) for g in (groups, SINGLE)]
    for module in modules:
        x = draw(tokens, tokens, D).to(dtype).requires_grad_()
        y = module(x)
        (y * draw(9, tokens, D).to(dtype)).sum().backward()
        assert x.grad is not None
        found.append((y.detach(), x.grad))
    what = f"{tokens} tokens, sequence parallel {groups.sequence_parallel}, {dtype}"
    for name, ours, expected in zip(("output", "gradient of x"), *found, strict=True):
        check_close(ours, expected, f"{what}: {name}")
    check_gradients(*modules, what)


def check_vocabulary(groups: Groups, tokens: int) -> None:
    ids = torch.arange(tokens) * 3 % VOCAB  # of both ranks' rows
    targets = torch.arange(tokens) * 7 % VOCAB
    cut, whole = make(Vocabulary, groups), make(Vocabulary, SINGLE)
    for module in (cut, whole):
        (module(ids, targets)[1] * draw(3, tokens)).sum().backward()
    for name, ours, expected in zip(("rows", "loss"), cut(ids, targets), whole(ids, targets), strict=True):
        check_close(ours, expected, f"{tokens} ids: {name}")
    check_gradients(cut, whole, f"{tokens} ids")


def check_parts(groups: Groups, tokens: int) -> None:
    """y = (2 r + 3) x + w x over ranks r, plus 5 x that each computes alike; the derivatives by hand."""
    rank = groups.tensor_rank
    x, w = draw(tokens, tokens, D).requires_grad_(), draw(5, tokens, 1).requires_grad_()
    alike, parts = enter_parts(enter_trunk(x, groups), tokens, groups)
    share = sum_gradients(w, groups) * parts * (0.25 if rank else 0.75)  # the parts make w x
    y = leave_trunk(leave_parts((2 * rank + 3) * parts + share, groups), tokens, groups)
    check_close(y, (3 + 5 + w) * x, "sum of parts")
    # a loss term that all ranks compute equally, of a gradient without strides
    (y.sum() + 5 * alike.sum()).backward()
    assert x.grad is not None and w.grad is not None
    check_close(x.grad, (3 + 5 + 5 + w).expand(tokens, D).detach(), "gradient of x")
    check_close(w.grad, x.sum(1, keepdim=True).detach(), "gradient of w")


def check_rows(groups: Groups) -> None:
    """7 tokens: rank 0 holds the first four, rank 1 three and a zero row."""
    x = draw(1, 7, D)
    rows = enter_trunk(x, groups)
    expected = F.pad(x, (0, 0, 0, 1)).chunk(2)[groups.tensor_rank] if groups.sequence_parallel else x
    assert torch.equal(rows, expected)
    assert torch.equal(leave_trunk(rows, 7, groups), x)


def all_cases() -> Any:
    with process_group(timeout_minutes=0.5):
        for sequence_parallel in (False, True):
            settings = ParallelConfig(tensor_parallel_size=RANKS, sequence_parallel=sequence_parallel)
            groups = groups_of(settings, 4)
            for tokens in TOKENS:
                check_matrices(groups, tokens, torch.float32)
                check_parts(groups, tokens)
                check_vocabulary(groups, tokens)
            check_matrices(groups, 7, torch.bfloat16)
            check_rows(groups)
            dist.barrier()
            destroy_groups()


def test_two_tensor_ranks_compute_what_one_process_computes() -> None:
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
