"""The learning rate by hand, and the warning of a schedule that changes in the middle of a run."""

from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain.config import OptimizerConfig
from mmmoe_pretrain.train.schedule import jump_on_resume, learning_rate
from tests.support import tiny_config

RATES = {"learning_rate": 1.0, "min_learning_rate": 0.2, "warmup_steps": 4}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Ends at step 14: warm-up by quarters, then 0.2 + 0.8 x what is left.
        ({}, {0: 0.25, 3: 1.0, 4: 1.0, 9: 0.6, 14: 0.2, 99: 0.2}),
        ({"schedule": "linear"}, {0: 0.25, 3: 1.0, 4: 1.0, 6: 0.84, 9: 0.6, 14: 0.2, 99: 0.2}),
        ({"schedule": "constant"}, {0: 0.25, 3: 1.0, 4: 1.0, 13: 1.0, 99: 1.0}),
        ({"schedule": "wsd", "wsd_decay_steps": 4}, {2: 0.75, 4: 1.0, 10: 1.0, 11: 0.8, 12: 0.6, 14: 0.2, 99: 0.2}),
        ({"schedule": "wsd"}, {12: 1.0, 13: 0.6, 14: 0.2}),  # a tenth of 14 steps is 2 of them
        ({"schedule": "wsd", "wsd_decay_steps": 50}, {3: 1.0, 4: 1.0, 9: 0.6, 14: 0.2}),  # behind the warm-up at most
        ({"decay_steps": 24}, {4: 1.0, 14: 0.6, 24: 0.2}),
        ({"schedule": "linear", "decay_steps": 8}, {6: 0.6, 8: 0.2, 13: 0.2}),
    ],
    ids=str,
)
def test_rates_of_each_schedule(settings: dict[str, Any], expected: dict[int, float]) -> None:
    config = OptimizerConfig(**{**RATES, **settings})
    assert {step: learning_rate(step, 14, config) for step in expected} == pytest.approx(expected)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(0, 10, OptimizerConfig(learning_rate=1.0, warmup_steps=0)) == 1.0


@pytest.mark.parametrize("settings", [{"schedule": "constant", "decay_steps": 9}, {"wsd_decay_steps": 9}])
def test_a_setting_that_the_schedule_does_not_use_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"decay_steps 9 has no meaning under optimizer.schedule"):
        OptimizerConfig(**settings)


def jump(tmp_path: Path, step: int, before: dict[str, Any], **now: Any) -> str:
    """Of a run of 14 steps under ``before`` that resumes after ``step`` with ``now``; 24 steps by default."""
    steps = {"steps": 14, "global_batch_size": 16}
    old = tiny_config(tmp_path, optimizer={**RATES, **before}, train=steps)
    longer = {**steps, "steps": now.pop("steps", 24)}
    new = tiny_config(tmp_path, optimizer={**RATES, **before, **now}, train=longer)
    return jump_on_resume(step, new, old.model_dump(mode="json"))


def test_a_longer_cosine_tells_the_rate_before_and_behind_and_the_way_out(tmp_path: Path) -> None:
    """The last step, number 14, had 0.2 + 0.4 (1 + cos 0.9 pi) = 0.22; half of the longer cosine is 0.6."""
    message = jump(tmp_path, 14, {})
    assert "rate of step 15 is 0.6; that of step 14 was 0.22, and the schedule so far gives 0.2" in message
    assert "train.steps was 14 and is 24" in message
    assert "optimizer.decay_steps=14 keeps" in message
    assert jump(tmp_path, 14, {}, decay_steps=14) == ""
    assert jump(tmp_path, 13, {}, steps=10) == ""  # all of its steps are done


@pytest.mark.parametrize(
    ("before", "step"),
    [({"schedule": "constant"}, 14), ({"schedule": "wsd", "wsd_decay_steps": 4}, 10), ({}, 0)],
    ids=["constant", "wsd before its decay", "nothing trained yet"],
)
def test_a_resume_at_the_same_rate_has_no_warning(tmp_path: Path, before: dict[str, Any], step: int) -> None:
    assert jump(tmp_path, step, before) == ""
    assert jump(tmp_path, step, before, steps=14) == ""


def test_any_change_of_the_rate_is_reported_with_the_setting_that_made_it(tmp_path: Path) -> None:
    message = jump(tmp_path, 6, {}, steps=14, learning_rate=0.5)
    assert "optimizer.learning_rate was 1.0 and is 0.5" in message
    assert "decay_steps=" not in message
    assert "schedule was 'wsd' and is 'linear'" in jump(tmp_path, 9, {"schedule": "wsd"}, steps=14, schedule="linear")
    assert jump(tmp_path, 14, {"schedule": "wsd"}), "its decay is over"
