"""Lending of experts: the plan by hand and for any loads, and layers that lend against one process. Trainings
that lend: tests/layouts."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmmoe_pretrain.config import MoEConfig, ParallelConfig
from mmmoe_pretrain.config.moe import LendingConfig
from mmmoe_pretrain.moe.dispatch import LocalDispatcher, make_dispatcher
from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.moe.lending import Loans, rows_that_pay, rows_to_ranks, share_rows
from mmmoe_pretrain.moe.plan import ExpertPlan
from mmmoe_pretrain.parallel.collectives import RowExchange
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import groups_of, run_ranks
from tests.moe.test_all_to_all import HostReads, ListReads

D, F, EXPERTS, TOKENS = 8, 16, 8, 40
ALWAYS = LendingConfig(threshold=1, min_rows=1)


def shared(totals: list[int], ranks: int, **changes: Any) -> tuple[list[list[int]], list[list[int]]]:
    found = share_rows(torch.tensor(totals), ranks, ALWAYS.model_copy(update=changes))
    return found.rows_ER.tolist(), found.borrowed_RS.tolist()


def test_the_rows_above_the_mean_go_to_the_ranks_below_it() -> None:
    # 4 ranks with 70, 10, 10 and 10 rows, 25 on average: 45 rows of expert 0 leave, 15 to each.
    rows, borrowed = shared([60, 10, 10, 0, 5, 5, 10, 0], 4)
    assert rows == [[15, 15, 15, 15], [10, 0, 0, 0], [0, 10, 0, 0], [0] * 4, [0, 0, 5, 0], [0, 0, 5, 0],
                    [0, 0, 0, 10], [0] * 4]  # fmt: skip
    assert borrowed == [[8, 8], [0, 8], [0, 8], [0, 8]]


def test_the_summary_adds_up_over_ranks() -> None:
    # Of the loads above: 70 rows become 25 on the fullest rank, and 25 are the mean; three copies are lent.
    found = share_rows(torch.tensor([60, 10, 10, 0, 5, 5, 10, 0]), 4, ALWAYS)
    assert (4 * found.summary).tolist() == [70, 25, 25, 3]


def test_the_experts_with_the_most_rows_are_lent_first() -> None:
    # 33 and 3 rows, 18 on average: of the 15 above it, expert 2 has 13 and expert 0 the other 2.
    totals = [11, 9, 13, 1, 1, 1]
    full = [[9, 2], [9, 0], [0, 13], [0, 1], [0, 1], [0, 1]]
    assert shared(totals, 2) == (full, [[6, 6], [0, 2]])
    fewer = [[11, 0], [9, 0], [0, 13], [0, 1], [0, 1], [0, 1]]
    assert shared(totals, 2, min_rows=3) == (fewer, [[6, 6], [2, 6]])
    assert shared(totals, 2, max_experts=1) == (fewer, [[6], [2]])


@pytest.mark.parametrize("totals", [[11, 9, 13, 1, 1, 1], [0] * 6])
def test_nothing_is_lent_up_to_the_threshold(totals: list[int]) -> None:
    own = [[rows, 0] for rows in totals[:3]] + [[0, rows] for rows in totals[3:]]
    assert shared(totals, 2, threshold=33 / 18) == (own, [[6, 6], [6, 6]])  # of 33 rows where 18 are the mean


def test_a_rank_computes_rows_of_its_own_before_others() -> None:
    # Of 12 rows of one expert rank 0 has 8 and rank 1 four, and each of 3 ranks computes four. Four stay on ranks 0
    # and 1, and the other four of rank 0 go to rank 2.
    counts_RE, rows_ER = torch.tensor([[8], [4], [0]]), torch.tensor([[4, 4, 4]])
    assert [rows_to_ranks(counts_RE, rows_ER, rank).tolist() for rank in range(3)] == [
        [[4, 0, 4]],
        [[0, 4, 0]],
        [[0] * 3],
    ]


@st.composite
def loads(draw: Any) -> tuple[Tensor, LendingConfig]:
    """[R, E] of 1 to 5 ranks with 1 to 4 experts each, and settings."""
    ranks, local = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rows = st.one_of(st.integers(0, 5), st.sampled_from([0, 0, 100, 1000]))
    counts = draw(st.lists(rows, min_size=ranks**2 * local, max_size=ranks**2 * local))
    config = LendingConfig(
        threshold=draw(st.sampled_from([1.0, 1.25, 3.0])),
        min_rows=draw(st.sampled_from([1, 7, 200])),
        max_experts=draw(st.integers(1, 5)),
    )
    return torch.tensor(counts).view(ranks, ranks * local), config


@settings(max_examples=100, deadline=None)
@given(loads())
def test_every_row_is_computed_once_and_no_rank_gets_more_than_the_mean_from_others(
    case: tuple[Tensor, LendingConfig],
) -> None:
    counts_RE, config = case
    (ranks, experts), totals_E = counts_RE.shape, counts_RE.sum(0)
    shares = share_rows(totals_E, ranks, config)
    rows_ER = shares.rows_ER
    to_RER = torch.stack([rows_to_ranks(counts_RE, rows_ER, rank) for rank in range(ranks)])
    assert (to_RER >= 0).all()
    assert torch.equal(to_RER.sum(2), counts_RE)
    assert torch.equal(to_RER.sum(0), rows_ER)
    own_ER = torch.arange(experts)[:, None] // (experts // ranks) == torch.arange(ranks)
    lent_ER = rows_ER.masked_fill(own_ER, 0)
    before_R, after_R, mean = totals_E.view(ranks, -1).sum(1), rows_ER.sum(0), int(totals_E.sum()) / ranks
    assert (after_R <= before_R.clamp(min=-int(-mean // 1))).all()  # at most its own, or the mean rounded up
    assert ((lent_ER == 0) | (lent_ER >= config.min_rows)).all()
    assert ((lent_ER > 0).sum(0) <= config.max_experts).all()
    assert before_R.max() > config.threshold * mean or not lent_ER.any()
    for rank, borrowed in enumerate(shares.borrowed_RS.tolist()):
        assert [e for e in borrowed if e < experts] == lent_ER[:, rank].nonzero().flatten().tolist()
        there_E = shares.slots_ER[:, rank][own_ER[:, rank] | (lent_ER[:, rank] > 0)]
        assert len(there_E.unique()) == len(there_E)
        assert (there_E // shares.slots_per_rank == rank).all()


def test_the_rows_that_pay_take_as_long_as_the_weights() -> None:
    # 3 weights, 2 bytes each, there and their gradients back at 4 bytes/s: 3 s; a row is 6 x 3 operations.
    rows = rows_that_pay(flop_rate=90.0, link_rate=4.0, weight_bytes=2)
    assert rows * 3 * 6 / 90 == pytest.approx(3.0)


def test_loans_are_told_from_what_every_rank_borrows() -> None:
    """Two experts a rank, 3 ranks: rank 1 borrows expert 0, rank 2 experts 0 and 3."""
    borrowed = torch.tensor([[6, 6], [0, 6], [0, 3]]).numpy()
    of_rank = [Loans.of(borrowed, 2, Groups(expert_rank=rank, expert_size=3)) for rank in range(3)]
    assert of_rank == [
        Loans([0, 0], [0, 1, 1], [0, 0, 0], None),
        Loans([1], [0, 0, 1], [1, 0, 0], None),
        Loans([], [0, 0, 0], [1, 1, 0], None),
    ]
    assert Loans.of(torch.full((3, 2), 6).numpy(), 2, Groups(expert_size=3)) is None


def skewed(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of a rank, of which most choose experts 0 and 1; some assignments go nowhere."""
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, D, generator=draw, dtype=torch.float64)
    chance = torch.tensor([20.0, 8.0, *[1.0] * (EXPERTS - 1)])  # the last: nowhere
    slots = torch.stack([torch.multinomial(chance, 2, generator=draw) for _ in range(TOKENS)])
    return x, slots, torch.rand(TOKENS, 2, generator=draw, dtype=torch.float64)


def outcome(config: MoEConfig, groups: Groups, rank: int) -> dict[str, Tensor]:
    experts = Experts(groups.local_experts(EXPERTS), D, F, config, groups).double()
    draw = torch.Generator().manual_seed(9)
    for parameter in experts.parameters():
        whole = torch.randn(EXPERTS, *parameter.shape[1:], generator=draw, dtype=torch.float64)
        parameter.data = whole[experts.local_experts.start : experts.local_experts.stop]
    x, slots, weights = skewed(rank)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    dispatcher = make_dispatcher(config, groups)
    assert isinstance(dispatcher, LocalDispatcher) == (groups is SINGLE)
    # fp64 routing weights are sent as fp32: rounded here first, so that both ways see the same numbers
    out, *_ = dispatcher.run(x, slots, weights.float(), experts)
    out.square().sum().backward()
    with torch.no_grad():
        again, *_ = dispatcher.run(x, slots, weights.float(), experts)
    grads = {name: parameter.grad for name, parameter in experts.named_parameters()}
    return {"out": out.detach(), "out again": again, "x": x.grad, "weights": weights.grad, **grads}


class Log:
    """What one layer lends, how many rows it computes on this rank, and how many numbers of 3-dimensional tensors,
    which are weights, leave in all passes."""

    def __init__(self) -> None:
        self.lent: list[int] = []
        self.rows = self.sent = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        make, compute, issue = Loans.of, Experts.forward, RowExchange.issue

        def of(*args: Any) -> Loans | None:
            loans = make(*args)
            assert loans is not None
            self.lent = loans.lent  # the same in both forward passes
            return loans

        def forward(experts: Experts, x: Tensor, weights: Tensor, plan: ExpertPlan, loans: Loans) -> Tensor:
            self.rows = plan.num_assignments
            return compute(experts, x, weights, plan, loans)

        def send(exchange: RowExchange, x: Tensor, *splits: list[int]) -> None:
            self.sent += x.numel() * (x.ndim == 3)
            issue(exchange, x, *splits)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loans, "of", of)
            patch.setattr(Experts, "forward", forward)
            patch.setattr(RowExchange, "issue", send)
            yield


def lending_ranks() -> list[tuple[list[int], int, list[str], int]]:
    """Of each number of expert ranks: what this rank lent, the rows that it computed, where its host waited, and the
    numbers in weights and their gradients that it sent."""
    found: list[Any] = []
    config = MoEConfig(num_experts=EXPERTS, expert_biases=True, lending=ALWAYS)
    with process_group(timeout_minutes=0.5):
        for size in (2, 4):
            groups = groups_of(ParallelConfig(expert_parallel_size=size), EXPERTS)
            log = Log()
            with log.kept(), HostReads() as operations, ListReads() as methods:
                here = outcome(config, groups, groups.data_rank)
            grads_of_experts = here.keys() - {"out", "out again", "x", "weights"}
            alone = outcome(config, SINGLE, groups.data_rank)
            for name, value in alone.items():
                if name in grads_of_experts:  # of all ranks' tokens, on the owner
                    dist.all_reduce(value, group=groups.expert)
                    local = groups.local_experts(EXPERTS)
                    value = value[local.start : local.stop]
                # fp64, so that nothing but the routing weights' fp32 (2^-24) can differ
                torch.testing.assert_close(here[name], value, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            found.append((log.lent, log.rows, methods.seen + operations.seen, log.sent))
            destroy_groups()
    return found


def test_layers_that_lend_compute_what_one_process_computes() -> None:
    ranks = run_ranks(4, lending_ranks)
    for which, size in enumerate((2, 4)):
        for first in range(0, 4, size):
            lent, rows, waits, sent = zip(*(rank[which] for rank in ranks[first : first + size]), strict=True)
            assert waits == (["tolist"] * 2,) * size  # once in each forward pass, of which there are two
            assert lent[0] and not any(lent[1:])  # experts 0 and 1 are on the first rank
            assert max(rows) <= -(-sum(rows) // size)  # the mean, rounded up
            assert sum(sent) == 3 * len(lent[0]) * 3 * F * D  # SwiGLU's three matrices there twice, gradients back
    assert ranks[0][1][0].count(0) == 3  # expert 0 is computed on all four ranks
