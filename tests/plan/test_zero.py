"""The traffic of DeepSpeed's ZeRO stages: what the plan says against what leaves each rank, exactly."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch.distributed as dist

from benchmarks.growth.layouts import Family, layout_config, zero_family
from benchmarks.growth.measured import Comparison, Totals, compare
from mmmoe_pretrain.engines import deepspeed
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks

SPREAD, WHOLE = {"expert_parallel_size": 2}, {"expert_parallel_size": 1}
TENSOR = {"tensor_parallel_size": 2, "sequence_parallel": True}
FAMILIES = {
    2: [zero_family(0, **SPREAD), zero_family(1, **TENSOR), zero_family(2, **WHOLE), zero_family(3, **SPREAD)],
    4: [zero_family(1, **SPREAD), zero_family(3, **SPREAD, tensor_parallel_size=2)],
}


def comparisons(families: list[Family]) -> list[Comparison]:
    found = []
    with process_group(timeout_minutes=0.5):
        for family in families:
            found.append(compare(layout_config(family, dist.get_world_size()), samples=2))
            destroy_groups()
    return found


def sent(totals: Totals) -> dict[object, float]:
    """Bytes by kind and ranks. Stage 3 gathers and scatters as many parameters in a call as it meets together."""
    found: dict[object, float] = defaultdict(float)
    for key, total in totals.items():
        found[key] += total.sent
    return {key: value for key, value in found.items() if value}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ranks", FAMILIES)
def test_bytes_and_calls_of_a_step_under_deepspeed_are_what_the_plan_says(ranks: int) -> None:
    deepspeed.prepare()  # before the fork: its import takes seconds
    for own in run_ranks(ranks, comparisons, FAMILIES[ranks]):
        for family, one in zip(FAMILIES[ranks], own, strict=True):
            assert sent(one.measured) == pytest.approx(sent(one.planned), rel=1e-12), family.name
            if family.degrees["zero_stage"] < 3:
                assert one.measured == one.planned, family.name
