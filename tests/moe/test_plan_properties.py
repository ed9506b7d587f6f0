"""Taking rows and summing them: adjoint to each other, whole or in the parts of expert groups."""

import pytest
import torch
from torch import Tensor

from mmmoe_pretrain.moe.plan import ExpertPlan, plan_of_runs, plan_of_slots, sort_slots, sum_rows, take_rows

SLOTS = torch.tensor([[1, 0], [3, 1], [3, 3], [1, 2]])  # four tokens, three experts; 3 is not sent


def plan_of(slots: Tensor) -> ExpertPlan:
    order, place, counts = sort_slots(slots, 3)
    return plan_of_slots(order, place, counts.tolist(), slots.shape[1])


def plan_of_three_runs() -> ExpertPlan:
    """Rows with 2, 1 and 3 assignments, to experts (1, 0), (1) and (2, 0, 1)."""
    return plan_of_runs(torch.tensor([1, 0, 1, 2, 0, 1]), torch.tensor([1, 0, 1, 1, 0, 0]), [2, 3, 1], 3)[0]


BOTH_FORMS = pytest.mark.parametrize("plan", [plan_of(SLOTS), plan_of_three_runs()], ids=["K slots a token", "runs"])


def rows(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, dtype=torch.float64, generator=generator, requires_grad=True)


@BOTH_FORMS
def test_taking_and_summing_are_each_others_adjoint(plan: ExpertPlan) -> None:
    x, y = rows(plan.num_rows), rows(plan.num_assignments, seed=1)
    # <take(x), y> = <x, sum(y)>, by the definition of an adjoint; fp64.
    left, right = (take_rows(x, plan) * y).sum(), (x * sum_rows(y, plan)).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda a: take_rows(a, plan), (x,))
    assert torch.autograd.gradcheck(lambda a: sum_rows(a, plan), (y,))


@BOTH_FORMS
def test_the_parts_of_two_groups_add_up_to_the_whole(plan: ExpertPlan) -> None:
    first = plan.counts[0] + plan.counts[1]
    groups = [plan.part(0, first, plan.counts[:2]), plan.part(first, plan.num_assignments, plan.counts[2:])]
    assert [part.num_assignments for part in groups] == [first, plan.counts[2]]
    assert [part.num_rows for part in groups] == [plan.num_rows] * 2
    x, y = rows(plan.num_rows), rows(plan.num_assignments, seed=1)
    assert torch.equal(torch.cat([take_rows(x, part) for part in groups]), take_rows(x, plan))
    summed = sum_rows(y[:first], groups[0]) + sum_rows(y[first:], groups[1])
    torch.testing.assert_close(summed, sum_rows(y, plan))
    for part, piece in zip(groups, (y[:first], y[first:]), strict=True):
        assert torch.autograd.gradcheck(lambda a, part=part: take_rows(a, part), (x,))
        assert torch.autograd.gradcheck(lambda a, part=part: sum_rows(a, part), (piece.detach().requires_grad_(),))


def test_nowhere_adds_zeros_whatever_stands_elsewhere() -> None:
    y_AD = torch.full((5, 2), torch.nan)
    assert sum_rows(y_AD, plan_of(SLOTS))[2].tolist() == [0.0, 0.0]  # token 2 is not sent


def test_nobody_to_serve_is_a_plan_too() -> None:
    idle = plan_of(torch.full((2, 2), 3))
    assert (idle.counts, idle.num_assignments, idle.num_rows) == ([0, 0, 0], 0, 2)
    assert sum_rows(torch.zeros(0, 4), idle).tolist() == [[0.0] * 4] * 2
    assert take_rows(torch.zeros(2, 4), idle).shape == (0, 4)
