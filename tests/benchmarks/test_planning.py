"""The time part of the benchmark of plans: which pairs of layouts count, and what a round is."""

from __future__ import annotations

import pytest

from benchmarks.planning.steps import TRIALS, Measured, Steps, trial_config
from benchmarks.planning.time import order_right
from mmmoe_pretrain.parallel.layout import resolve_layout


def measured(*walls: float) -> Measured:
    return Measured(tuple(Steps(wall, work=2 * wall, tokens=8, imbalance=1.0) for wall in walls))


def test_only_pairs_that_differ_by_more_than_their_spread_must_be_in_order() -> None:
    """Medians 10, 11 and 20; the first spreads by 2, so it and the second do not count."""
    found = {"a": measured(8, 10, 12), "b": measured(11, 11, 11), "c": measured(20, 20, 20)}
    assert found["a"].median(busy=False) == 10 and found["a"].median(busy=True) == 20
    assert found["a"].spread(busy=False) == 2
    assert order_right("abc", found, {"a": 3, "b": 2, "c": 4}, busy=False) == (1.0, 2)
    assert order_right("abc", found, {"a": 3, "b": 2, "c": 2.5}, busy=False) == (0.5, 2)


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_every_trial_is_a_legal_layout(trial) -> None:  # type: ignore[no-untyped-def]
    assert resolve_layout(trial_config(trial), trial.ranks).world_size == trial.ranks


def test_three_layouts_calibrate_and_more_than_six_are_predicted() -> None:
    assert sum(trial.calibrating for trial in TRIALS) == 3
    assert len(TRIALS) - 3 >= 6
