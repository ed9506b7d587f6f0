"""Ranks that have less to do than others, or nothing: never a hang, and the gradients of one process."""

from functools import partial
from pathlib import Path

import pytest

from tests.distributed import run_ranks
from tests.layouts import matrix
from tests.layouts.cases import LAYOUTS, Case
from tests.layouts.train import start_ranks, train_alone

ENGINES = [("EP2", "megatron", 0), ("EP2", "megatron", 1), ("EP2", "deepspeed", 2), ("DP2", "deepspeed", 3),
           ("PP2", "megatron", 0), ("PP2 x VPP2", "megatron", 1), ("TP2 + SP", "megatron", 0),
           ("TP2", "deepspeed", 1)]  # fmt: skip
TRAIN = {"num_microbatches": 2, "global_batch_size": 16}
STEPS = 2  # the second begins with what an uneven one has left
UNEVEN = {
    "no image anywhere": (("at", "t", "a", "at", "t", "at", "a", "t"), False),
    "no valid token on the later ranks": (("iat", "it", "ia", "iat", "", "", "", ""), False),
    "no valid token on the first ranks": (("", "", "", "", "iat", "it", "ia", "iat"), False),
    "no valid token at all": (("",) * 8, False),
    "a batch cut short": (("iat", "it", "ia", "iat", "it", "", "", ""), False),
    "every token to the same experts": (("iat", "it", "ia", "iat", "t", "at", "a", "t"), True),
}


@pytest.mark.parametrize("what", UNEVEN)
def test_uneven_work_trains_like_one_process(tmp_path: Path, what: str) -> None:
    samples, one_expert = UNEVEN[what]
    uncut = partial(train_alone, samples=samples, one_expert=one_expert, train=TRAIN)
    alone = run_ranks(1, uncut, tmp_path, STEPS)[0]
    cases = [
        Case(layout, 2, engine, zero, LAYOUTS[layout][1], train=TRAIN, samples=samples, one_expert=one_expert)
        for layout, engine, zero in ENGINES
    ]
    outcomes = start_ranks(2, cases, tmp_path, STEPS, 200)
    comparisons = [matrix.compare(case, [rank[i] for rank in outcomes], alone) for i, case in enumerate(cases)]
    assert all(comparison.passed for comparison in comparisons), [v for v in comparisons if not v.passed]
