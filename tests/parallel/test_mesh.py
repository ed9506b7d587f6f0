"""Which layouts are legal, and what is said of the others."""

import pytest

from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.mesh import resolve_expert_parallel_size


@pytest.mark.parametrize("num_experts,world_size,expected", [(8, 1, 1), (8, 2, 2), (8, 6, 2), (6, 4, 2), (1, 4, 1)])
def test_auto_takes_the_widest_spread_that_divides_experts_and_ranks(
    num_experts: int, world_size: int, expected: int
) -> None:
    assert resolve_expert_parallel_size("auto", num_experts, world_size) == expected


def test_a_size_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"expert_parallel_size 3 .*num_experts 8 on 4 ranks.*\[1, 2, 4\]"):
        resolve_expert_parallel_size(3, 8, 4)


def test_experts_are_cut_into_runs_by_expert_rank() -> None:
    groups = Groups(data_size=4, data_rank=3, expert_size=2, expert_rank=1)
    assert groups.local_experts(8) == range(4, 8)
    assert groups.expert_data_size == 2
