"""Losses on record: one process still gives them, and so do layouts of each kind (make parity: all of both)."""

import pytest

from tests.layouts import golden
from tests.layouts.cases import ALONE
from tests.layouts.train import train_alone

STEPS_ALONE, STEPS = 24, 12
SOME = ("EP2 megatron ZeRO-1 fp32", "PP2 x VPP2 megatron ZeRO-1 fp32")


def test_one_process_gives_the_recorded_losses() -> None:
    alone = train_alone(ALONE, STEPS_ALONE)
    assert golden.largest_difference([alone]) <= golden.BOUND
    assert alone.losses[-1]["total"] < 0.8 * alone.losses[0]["total"]  # there is something to follow
    alone.losses[20]["captioning"] += 1e-3
    assert golden.largest_difference([alone]) > golden.BOUND


@pytest.mark.parametrize("name", SOME)
def test_a_layout_gives_the_recorded_losses(name: str) -> None:
    (case,) = [case for case in golden.golden_cases() if case.name == name]
    assert golden.run(case, STEPS) <= golden.BOUND
