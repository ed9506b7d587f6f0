"""When enough steps were bad, and which batches are left out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.data.loader import LoadStats, StepData
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.objectives.counts import StepCounts
from mmmoe_pretrain.train.rollback import BadSteps, Skips, Trouble, read_skips
from tests.support import tiny_config


def data(step: int) -> StepData:
    return StepData(step, step, [], LoadStats())


def result(skipped: bool, scale: float = 1.0) -> StepResult:
    loss = math.nan if skipped else 1.0
    return StepResult({"total": loss}, 1.0, StepCounts(10, {}), (), skipped=skipped, loss_scale=scale)


def first_trouble(tmp_path: Path, skipped: str, scale: float = 1.0, **sections: Any) -> Trouble | None:
    """``skipped``: a letter a step, x for one that was left out."""
    bad = BadSteps(tiny_config(tmp_path, faults={"max_skipped_steps": 2}, **sections))
    for step, letter in enumerate(skipped):
        trouble = bad.add(data(step), result(letter == "x", scale))
        assert bad.in_streak == (letter == "x" and scale == 1.0)
        if trouble is not None:
            return trouble
    return None


def test_only_steps_in_a_row_count(tmp_path: Path) -> None:
    assert first_trouble(tmp_path, ".xx.xx.x.xx.") is None
    trouble = first_trouble(tmp_path, ".xx.xxxx")
    assert trouble is not None
    assert (trouble.kind, trouble.steps) == ("not finite", range(4, 7))


def test_overflows_above_the_smallest_loss_scale_are_no_faults(tmp_path: Path) -> None:
    half = {"train": {"precision": "fp16", "loss_scale": {"minimum": 1.0}}}
    assert first_trouble(tmp_path, "x" * 20, scale=1024.0, **half) is None
    assert first_trouble(tmp_path, "x" * 3, scale=1.0, **half) is not None


@pytest.mark.parametrize(
    ("steps", "margin", "resume_step", "window", "batches"),
    [
        (range(6, 8), 1, 4, (5, 9), [0, 1, 2, 3, 4, 9, 10]),
        (range(6, 8), 1, 6, (6, 9), [0, 1, 2, 3, 4, 5, 9]),  # batch 5 is of the checkpoint
        (range(0, 1), 3, 0, (0, 4), [4, 5, 6]),
    ],
)
def test_the_window_has_a_margin_but_nothing_that_the_checkpoint_knows(
    steps: range, margin: int, resume_step: int, window: tuple[int, int], batches: list[int]
) -> None:
    skips = Skips()
    assert skips.leave_out(Trouble("not finite", steps, ""), margin, resume_step) == window
    assert [skips.cursor.batch(step) for step in range(len(batches))] == batches
    assert skips.rollbacks == 1


def test_what_is_left_out_is_read_back_and_joined_with_a_checkpoint_s(tmp_path: Path) -> None:
    Skips(Cursor(((5, 9),)), rollbacks=2).write(tmp_path)
    skips = read_skips(tmp_path)
    skips.add(Cursor(((8, 12), (20, 21))))
    assert (skips.cursor.skipped, skips.rollbacks) == (((5, 12), (20, 21)), 2)
    assert read_skips(tmp_path / "none") == Skips()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"skipped_batches": [], "rollbacks": 1, "back_to": -1}',
        '{"skipped_batches": [[3, 1]], "rollbacks": 1}',
        '{"skipped_batches": []}',
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "skipped_batches.json").write_text(text)
    with pytest.raises(ValueError, match=r"skipped_batches\.json is damaged"):
        read_skips(tmp_path)
