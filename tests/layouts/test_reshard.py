"""A few of the pairs of ``make reshard``: all of them take minutes."""

from pathlib import Path

import pytest

from tests.layouts.reshard import CASES, all_pairs, run

# Every ZeRO stage of either engine loads what another layout saved. What any of them would save, its export_state, is
# compared with one process in test_matrix.py and test_variants.py.
PAIRS = [("EP2 megatron ZeRO-1", "EP2 deepspeed ZeRO-3"), ("EP2 deepspeed ZeRO-3", "PP2 x VPP2 megatron ZeRO-1"),
         ("PP2 x VPP2 megatron ZeRO-1", "TP2 + SP megatron"), ("EP2 deepspeed ZeRO-3", "one process megatron"),
         ("PP2 x VPP2 megatron ZeRO-1", "DP2 deepspeed ZeRO-2"),
         ("EP2 megatron ZeRO-1", "TP2 x EP2 deepspeed ZeRO-1"),
         ("EP2 deepspeed ZeRO-3 sgd", "EP2 deepspeed sgd"),
         ("EP2 deepspeed ZeRO-3 sgd", "DP2 deepspeed ZeRO-2 sgd"),
         ("EP2 deepspeed ZeRO-3 sgd", "PP2 x VPP2 megatron sgd"),
         ("EP2 deepspeed ZeRO-3 adamw", "PP2 x VPP2 megatron ZeRO-1 adamw")]  # fmt: skip


@pytest.mark.timeout(240)
def test_a_checkpoint_of_one_layout_resumes_under_another(tmp_path: Path) -> None:
    by_name = {case.name.removesuffix(" fp32"): case for case in CASES}
    pairs = [(by_name[before], by_name[after]) for before, after in PAIRS]
    comparisons = list(run(pairs, tmp_path))
    assert len(comparisons) == len(PAIRS)
    assert all(comparison.passed for comparison in comparisons), [v for v in comparisons if not v.passed]


def test_the_matrix_holds_every_ordered_pair_and_both_engines() -> None:
    pairs = all_pairs()
    assert len(set(pairs)) >= 20
    engines = {(before.engine, after.engine) for before, after in pairs}
    assert len(engines) == 4
