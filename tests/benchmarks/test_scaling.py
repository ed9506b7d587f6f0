"""The benchmark of communication: what is counted is what the plan says, and a difference would show."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks import scaling
from benchmarks.growth.layouts import FAMILIES, layout_config
from benchmarks.growth.measured import Comparison, Totals, compare
from mmmoe_pretrain.parallel.counting import ALL_REDUCE, ALL_TO_ALL, Total
from mmmoe_pretrain.parallel.mesh import destroy_groups
from mmmoe_pretrain.parallel.runtime import process_group
from tests.distributed import run_ranks

COUNTED = ("EP, ZeRO-1", "EP, blocks recomputed", "TP2 + SP x EP", "PP2 x VPP2 x EP")
GATED = {"shared_expert_hidden_size": 8, "shared_expert_gate": True, "expert_biases": True}
COMMUNICATING = {"expert_attention_size": 4, "routing_memory_size": 3}
A, B = (ALL_TO_ALL, (0, 1)), (ALL_REDUCE, (0, 1))


def comparisons(names: tuple[str, ...]) -> dict[str, Comparison]:
    found = {}
    with process_group(timeout_minutes=0.5):
        for family in FAMILIES:
            if family.name in names:
                config = layout_config(family, dist.get_world_size())
                more: dict[str, dict[str, Any]] = {"": {}}
                if config.parallel.tensor_parallel_size > 1:
                    more |= {", gated": GATED, ", communicating": {**GATED, **COMMUNICATING}}
                elif config.parallel.pipeline_parallel_size > 1:
                    more[", communicating"] = COMMUNICATING
                for name, update in more.items():
                    moe = config.moe.model_copy(update=update)
                    found[family.name + name] = compare(config.model_copy(update={"moe": moe}), samples=2)
                    destroy_groups()
    return found


@pytest.mark.filterwarnings("ignore")
def test_calls_and_bytes_of_a_step_are_what_the_plan_says() -> None:
    for rank in run_ranks(2, comparisons, COUNTED):
        for name, own in rank.items():
            assert own.measured == own.planned, name  # exactly: both are sums of the same few products
            assert own.measured and own.rows <= own.most_rows, name
        assert rank["EP, ZeRO-1"].rows > 0 and "TP2 + SP x EP, gated" in rank


def both(measured: Totals, planned: Totals) -> Comparison:
    return Comparison(measured, planned, planned, rows=3, most_rows=4)


def test_an_error_is_the_worst_of_any_kind_group_and_rank() -> None:
    right = both({A: Total(2, 100.0), B: Total(1, 8.0)}, {A: Total(2, 100.0), B: Total(1, 8.0)})
    wrong = both({A: Total(2, 100.0), B: Total(1, 8.0)}, {A: Total(2, 75.0), B: Total(2, 8.0)})
    row = scaling.make_row([right, wrong])
    assert row.error == 0.25 and row.calls_differ and row.rows == 0.75
    assert row.kinds == {ALL_TO_ALL: Total(2, 100.0), ALL_REDUCE: Total(1, 8.0)}
    assert row.planned[ALL_TO_ALL] == 87.5
    assert scaling.make_row([right]).error == 0 and not scaling.make_row([right]).calls_differ
    missing = both({A: Total(2, 100.0)}, {B: Total(1, 8.0)})
    assert scaling.make_row([missing]).error == 1.0


def test_the_last_line_names_the_layouts_whose_calls_differ() -> None:
    row = scaling.make_row([both({A: Total(2, 100.0)}, {A: Total(2, 100.0)})])
    rows = {("DP", 2): row, ("EP", 4): replace(row, error=0.5, calls_differ=True, even_error=0.25)}
    found = json.loads(json.dumps(scaling.summary(rows), allow_nan=False))
    assert found["worst_relative_error"] == 0.5 and found["calls_differ"] == ["EP on 4"]
    assert found["worst_even_error"] == 0.25 and found["bytes"] == {"DP": {"2": 100}, "EP": {"4": 100}}
