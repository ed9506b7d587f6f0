"""Index arithmetic of the plans, by hand and as properties."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmmoe_pretrain.moe.plan import ExpertPlan, plan_of_runs, plan_of_slots, sort_slots, sum_rows, take_rows

# Three tokens with two slots each, of three experts; slot 3 is nowhere.
SLOTS = torch.tensor([[2, 0], [3, 3], [0, 2]])


def plan_by_hand() -> ExpertPlan:
    order, place, counts = sort_slots(SLOTS, 3)
    assert order.tolist() == [1, 4, 0, 5, 2, 3]  # expert 0: tokens 0 and 2; expert 2: tokens 0 and 2
    assert place.tolist() == [2, 0, 4, 5, 1, 3]
    assert counts.tolist() == [2, 0, 2]
    return plan_of_slots(order, place, counts.tolist(), top_k=2)


def test_assignments_sort_by_expert_and_keep_the_order_of_tokens() -> None:
    plan = plan_by_hand()
    assert plan.rows_A.tolist() == [0, 2, 0, 2]
    assert plan.counts == [2, 0, 2]
    assert plan.offsets_m is not None  # token 1 has no assignment
    assert (plan.place.tolist(), plan.offsets_m.tolist()) == ([2, 0, 1, 3], [0, 2, 2])
    assert (plan.num_assignments, plan.num_rows) == (4, 3)


def test_where_every_assignment_is_kept_the_plan_has_a_place_for_each() -> None:
    order, place, counts = sort_slots(torch.tensor([[1, 0], [0, 1]]), 2)
    plan = plan_of_slots(order, place, counts.tolist(), top_k=2)
    assert plan.complete and plan.offsets_m is None
    assert plan.place.tolist() == [[2, 0], [1, 3]]


def test_rows_are_taken_and_summed_by_the_plan() -> None:
    plan = plan_by_hand()
    x = torch.tensor([[1.0], [2.0], [4.0]], requires_grad=True)
    taken = take_rows(x, plan)
    assert taken.flatten().tolist() == [1.0, 4.0, 1.0, 4.0]
    out = sum_rows(taken * torch.tensor([[1.0], [10.0], [100.0], [1000.0]]), plan)
    assert out.flatten().tolist() == [1 + 100, 0, 4 * 10 + 4 * 1000]
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [101.0, 0.0, 1010.0]


def test_a_part_of_a_plan_sums_its_experts_alone() -> None:
    part = plan_by_hand().part(2, 4, [0, 2])
    assert part.rows_A.tolist() == [0, 2]
    assert part.place.tolist() == [0, 2, 2, 1]  # 2 is none
    assert part.sum_by_row(torch.tensor([[5.0], [7.0], [0.0]])).flatten().tolist() == [5.0, 0.0, 7.0]


def test_rows_with_runs_of_unlike_length_expand_and_sum() -> None:
    # Row 0 goes to experts 1 and 0, row 1 to expert 1, row 2 to experts 0 and 1.
    experts, first = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([1, 0, 1, 1, 0])
    plan, order = plan_of_runs(experts, first, [2, 3], num_rows=3)
    assert order.tolist() == [1, 3, 0, 2, 4]
    assert plan.rows_A.tolist() == [0, 2, 0, 1, 2]
    assert plan.offsets_m is not None
    assert plan.offsets_m.tolist() == [0, 2, 3]
    assert sum_rows(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), plan).flatten().tolist() == [4.0, 4.0, 7.0]
    first_expert = plan.part(0, 2, [2])
    assert not first_expert.complete
    assert sum_rows(torch.tensor([[1.0], [2.0]]), first_expert).flatten().tolist() == [1.0, 0.0, 2.0]


def test_no_rows_and_no_assignments_make_an_empty_plan() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    plan, order = plan_of_runs(none, none, [0, 0], num_rows=0)
    assert (plan.num_assignments, plan.num_rows, order.numel()) == (0, 0, 0)
    assert sum_rows(take_rows(torch.zeros(0, 4), plan), plan).shape == (0, 4)


@st.composite
def slots(draw: st.DrawFn) -> Tensor:
    """[n, K] of 5 experts; 5 is nowhere."""
    tokens, top_k = draw(st.integers(0, 6)), draw(st.integers(1, 3))
    flat = draw(st.lists(st.integers(0, 5), min_size=tokens * top_k, max_size=tokens * top_k))
    return torch.tensor(flat, dtype=torch.int64).view(tokens, top_k)


@settings(max_examples=60, deadline=None)
@given(slots())
def test_any_slots_come_back_as_often_as_they_went_somewhere(slots_nK: Tensor) -> None:
    order, place, counts = sort_slots(slots_nK, 5)
    plan = plan_of_slots(order, place, counts.tolist(), slots_nK.shape[1])
    x = torch.arange(1.0, 1 + slots_nK.shape[0], dtype=torch.float64)[:, None].requires_grad_()
    expected = x.detach() * (slots_nK < 5).sum(-1, keepdim=True)
    assert torch.equal(sum_rows(take_rows(x, plan), plan).detach(), expected)
    assert counts.tolist() == [(slots_nK == e).sum() for e in range(5)]
    assert torch.autograd.gradcheck(lambda y: sum_rows(take_rows(y, plan).square(), plan), x)
