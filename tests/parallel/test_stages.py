"""Stages cut by cost: the costliest is as cheap as any cut allows."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmoe_pretrain.parallel.stages import Stage, cut_stages, stages_of_rank


def costliest(costs: list[int], bounds: tuple[int, ...], first_extra: int, last_extra: int) -> int:
    sums = [sum(costs[begin:end]) for begin, end in pairwise(bounds)]
    sums[0] += first_extra
    sums[-1] += last_extra
    return max(sums)


def unevenness(bounds: tuple[int, ...]) -> int:
    return sum((end - begin) ** 2 for begin, end in pairwise(bounds))


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.integers(0, 9), min_size=1, max_size=9),
    num_stages=st.integers(1, 9),
    first_extra=st.integers(0, 20),
    last_extra=st.integers(0, 20),
)
def test_no_cut_has_a_cheaper_costliest_stage_or_as_cheap_a_one_with_evener_counts(
    costs: list[int], num_stages: int, first_extra: int, last_extra: int
) -> None:
    num_stages = min(num_stages, len(costs))
    stages = cut_stages(costs, num_stages, first_extra, last_extra)
    found = (0, *(stage.end_block for stage in stages))
    every_cut = [(0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), num_stages - 1)]
    assert found in every_cut
    assert [stage.first_block for stage in stages] == list(found[:-1])
    assert (costliest(costs, found, first_extra, last_extra), unevenness(found)) == min(
        (costliest(costs, cut, first_extra, last_extra), unevenness(cut)) for cut in every_cut
    )


def test_embedders_and_heads_push_blocks_to_the_middle() -> None:
    """Blocks of 1, embedders of 2, heads of 1: stages of 4 + 4 + 4 FLOPs hold 2, 4 and 3 blocks."""
    assert cut_stages([1.0] * 9, 3, 2.0, 1.0) == (
        Stage(0, 2, first=True, last=False),
        Stage(2, 6, first=False, last=False),
        Stage(6, 9, first=False, last=True),
    )


@pytest.mark.parametrize("num_stages", [0, 4])
def test_a_stage_without_a_block_is_refused(num_stages: int) -> None:
    with pytest.raises(ValueError, match=f"3 blocks cannot be cut into {num_stages} .*use 1 to 3 stages"):
        cut_stages([1, 1, 1], num_stages, 0, 0)


def test_a_rank_holds_every_pipeline_size_th_stage() -> None:
    """PP2 x VPP2: the data passes rank 0, 1, 0, 1."""
    stages = cut_stages([1, 1, 1, 1], 4, 0, 0)
    assert [stage.first_block for stage in stages_of_rank(stages, 0, 2, 2)] == [0, 2]
    assert [stage.first_block for stage in stages_of_rank(stages, 1, 2, 2)] == [1, 3]
    assert [stage.last for stage in stages_of_rank(stages, 1, 2, 2)] == [False, True]
