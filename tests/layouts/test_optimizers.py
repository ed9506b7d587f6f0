"""SGD with momentum under both engines and every ZeRO stage, against torch's in one process; gradients are clipped.

The cases of AdamW are those of the matrix, whose bounds hold here, too: SGD divides by nothing.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_ranks
from tests.layouts.cases import LAYOUTS, SGD, STEPS, Case
from tests.layouts.matrix import compare
from tests.layouts.train import start_ranks, train_alone


def case(layout: str, engine: str, zero_stage: int, **parallel: Any) -> Case:
    return Case(layout, 2, engine, zero_stage, {**LAYOUTS[layout][1], **parallel}, optimizer=SGD)


CASES = [
    case("EP2", "megatron", 0),
    case("TP2 + SP", "megatron", 0),
    case("PP2 x VPP2", "megatron", 0),
    case("EP2", "deepspeed", 0),
    case("EP2", "deepspeed", 1),
    case("DP2", "deepspeed", 2, offload_optimizer="cpu"),
    case("EP2", "deepspeed", 3),
]


@pytest.mark.timeout(240)
def test_sgd_with_momentum_is_that_of_torch_under_every_engine_and_stage(tmp_path: Path) -> None:
    (alone,) = run_ranks(1, partial(train_alone, kind=SGD), tmp_path, STEPS)
    outcomes = start_ranks(2, CASES, tmp_path, STEPS, timeout=200)
    comparisons = [compare(case, [rank[i] for rank in outcomes], alone) for i, case in enumerate(CASES)]
    assert all(comparison.passed for comparison in comparisons), [v for v in comparisons if not v.passed]
    (adam,) = run_ranks(1, train_alone, tmp_path, STEPS)
    assert adam.losses[-1]["total"] != pytest.approx(alone.losses[-1]["total"], rel=1e-3)
