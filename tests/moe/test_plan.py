"""Index arithmetic of the plans: by hand, against a loop over any slots, and as each other's adjoint."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmmoe_pretrain.moe.plan import ExpertPlan, plan_of_runs, plan_of_slots, sum_rows, take_rows

# Four tokens with two slots each, of three experts; slot 3 is nowhere, and token 2 goes nowhere.
SLOTS = torch.tensor([[1, 0], [3, 1], [3, 3], [1, 2]])


def plan_of_three_runs() -> ExpertPlan:
    """Row 0 goes to experts 1 and 0, row 1 to expert 1, row 2 to experts 2, 0 and 1."""
    experts, first = torch.tensor([1, 0, 1, 2, 0, 1]), torch.tensor([1, 0, 1, 1, 0, 0])
    plan, order_A = plan_of_runs(experts, first, [2, 3, 1], num_rows=3)
    assert order_A.tolist() == [1, 4, 0, 2, 5, 3]
    return plan


BOTH_FORMS = pytest.mark.parametrize(
    "plan", [plan_of_slots(SLOTS, 3)[0], plan_of_three_runs()], ids=["K slots a token", "runs"]
)


def rows(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, dtype=torch.float64, generator=generator, requires_grad=True)


def test_assignments_are_sorted_by_expert_and_keep_the_order_of_tokens() -> None:
    plan, order_A = plan_of_slots(SLOTS, 3)
    assert order_A.tolist() == [1, 0, 3, 6, 7]
    assert (plan.rows_A.tolist(), plan.counts) == ([0, 0, 1, 3, 3], [1, 3, 1])
    assert plan.experts_A.tolist() == [0, 1, 1, 1, 2]
    assert (plan.place_A.tolist(), plan.offsets_m.tolist()) == ([1, 0, 2, 3, 4], [0, 2, 3, 3])
    assert (plan.num_assignments, plan.num_rows) == (5, 4)
    runs = plan_of_three_runs()
    assert (runs.rows_A.tolist(), runs.offsets_m.tolist()) == ([0, 2, 0, 1, 2, 2], [0, 2, 3])


@BOTH_FORMS
def test_taking_and_summing_are_each_others_adjoint_and_parts_add_up_to_the_whole(plan: ExpertPlan) -> None:
    x, y = rows(plan.num_rows), rows(plan.num_assignments, seed=1)
    first = plan.counts[0] + plan.counts[1]
    parts = [plan.part(0, first, plan.counts[:2]), plan.part(first, plan.num_assignments, plan.counts[2:])]
    assert torch.equal(torch.cat([take_rows(x, part) for part in parts]), take_rows(x, plan))
    torch.testing.assert_close(sum_rows(y[:first], parts[0]) + sum_rows(y[first:], parts[1]), sum_rows(y, plan))
    for any_plan, part_y in ((plan, y), (parts[0], y[:first]), (parts[1], y[first:])):
        assert any_plan.num_rows == plan.num_rows
        # <take(x), y> = <x, sum(y)>, by the definition of an adjoint; fp64.
        left, right = (take_rows(x, any_plan) * part_y).sum(), (x * sum_rows(part_y, any_plan)).sum()
        assert left.item() == pytest.approx(right.item(), rel=1e-12)
        for function, leaf in ((take_rows, x), (sum_rows, part_y.detach().requires_grad_())):
            assert torch.autograd.gradcheck(lambda a, f=function, p=any_plan: f(a, p), (leaf,))


def test_a_row_that_goes_nowhere_becomes_zeros_whatever_the_others_are() -> None:
    assert sum_rows(torch.full((5, 2), torch.nan), plan_of_slots(SLOTS, 3)[0])[2].tolist() == [0.0, 0.0]


def test_no_rows_and_no_assignments_make_an_empty_plan() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    for plan in (plan_of_runs(none, none, [0, 0], num_rows=0)[0], plan_of_slots(torch.full((2, 2), 3), 3)[0]):
        assert not any(plan.counts)
        assert take_rows(torch.zeros(plan.num_rows, 4), plan).shape == (0, 4)
        assert sum_rows(torch.zeros(0, 4), plan).tolist() == [[0.0] * 4] * plan.num_rows
        assert sum_rows(torch.zeros(0, 4), plan.part(0, 0, [0])).tolist() == [[0.0] * 4] * plan.num_rows


@st.composite
def slots(draw: st.DrawFn) -> Tensor:
    """[n, K] of 5 experts; 5 is nowhere, and the same expert twice is allowed."""
    tokens, top_k = draw(st.integers(0, 6)), draw(st.integers(1, 3))
    flat = draw(st.lists(st.integers(0, 5), min_size=tokens * top_k, max_size=tokens * top_k))
    return torch.tensor(flat, dtype=torch.int64).view(tokens, top_k)


@settings(max_examples=60, deadline=None)
@given(slots())
def test_any_slots_come_back_as_often_as_they_went_somewhere(slots_nK: Tensor) -> None:
    plan, order_A = plan_of_slots(slots_nK, 5)
    sent = [(slot, flat) for flat, slot in enumerate(slots_nK.flatten().tolist()) if slot < 5]
    assert list(zip(plan.experts_A.tolist(), order_A.tolist(), strict=True)) == sorted(sent)
    x = torch.arange(1.0, 1 + slots_nK.shape[0], dtype=torch.float64)[:, None]
    expected = x * (slots_nK < 5).sum(-1, keepdim=True)
    assert torch.equal(sum_rows(take_rows(x, plan), plan), expected)
