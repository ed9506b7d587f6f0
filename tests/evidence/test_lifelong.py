"""Sequences of runs: what is lost and carried over, by hand, and the commands that make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evidence.lifelong import AVERAGE, BACKWARD, FORGETTING, FORWARD, LANGUAGES, LIFELONG, measures, of_reports
from evidence.runs import Task
from mmmoe_pretrain.evaluate import report
from mmmoe_pretrain.evaluate.report import Report


def test_measures_are_those_of_a_table_by_hand() -> None:
    """Stage 1 falls from 0.8 by 0.5 at the end, and was at 0.6 between; stage 2 rises from 0.5 to 0.6 at the end, its
    best. Before they are trained, stage 2 is at 0.3 and stage 3 at 0.2, where chance is 0.1 and 0.25."""
    score_TT = np.array([[0.8, 0.3, 0.1], [0.6, 0.5, 0.2], [0.3, 0.6, 0.9]])
    found = measures(score_TT, np.array([0.1, 0.1, 0.25]))
    assert found == pytest.approx(
        {AVERAGE: 0.6, FORGETTING: (0.5 - 0.1) / 2, BACKWARD: (-0.5 + 0.1) / 2, FORWARD: (0.2 - 0.05) / 2}
    )


def evaluation(values: dict[str, float]) -> Report:
    rows: list[dict[str, Any]] = [
        {"metric": f"r10/{name}", "value": its, "chance": 0.1} for name, its in values.items()
    ]
    return Report("made", 1, "", [], rows, {})


def test_a_stage_has_the_mean_of_its_group() -> None:
    first = evaluation({"a": 0.8, "b": 0.4, "c": 0.2})
    last = evaluation({"a": 0.2, "b": 0.2, "c": 0.7})
    found = of_reports([first, last], (("a", "b"), ("c",)), "r10")
    expected = {AVERAGE: 0.45, FORGETTING: 0.4, BACKWARD: -0.4, FORWARD: 0.1}
    assert found == pytest.approx(expected)
    assert of_reports([last], (("a", "b"), ("c",)), "r10") == pytest.approx({AVERAGE: 0.45})
    with pytest.raises(ValueError, match=r"the evaluation of made has no r10/d; score held-out rows of all"):
        of_reports([first], (("d",),), "r10")


def test_each_stage_is_made_of_the_one_before_trained_and_evaluated(tmp_path: Path) -> None:
    task = Task(LIFELONG, LIFELONG.variant("experts"), 2, tmp_path)
    folders = [run.config().run_dir for run in task.sequence()]
    assert folders == [*(tmp_path / f"lifelong-experts-stage{i}-seed2" for i in (1, 2, 3)),
                       tmp_path / "lifelong-experts-seed2"]  # fmt: skip
    calls = task.calls()
    assert [call.arguments[0] for call in calls] == ["train", "evaluate", *["extend", "train", "evaluate"] * 3]
    change = calls[5].arguments
    assert change[:6] == ("extend", str(folders[1]), "--out", str(folders[2]), "--add-experts=4", "--wake-steps=20")
    assert "moe.num_experts=24" in change and "optimizer.hold" in change[-1] and "[:20]" in change[-1]
    assert [run.config().moe.num_experts for run in task.sequence()] == [16, 20, 24, 28]
    assert len(LANGUAGES) == len(folders) and len({*sum(LANGUAGES, ())}) == 12
    folders[0].mkdir()
    (folders[0] / report.JSON).touch()
    folders[1].mkdir()
    assert [call.arguments[0] for call in task.calls()][:4] == ["train", "train", "evaluate", "extend"]


def test_replay_is_a_third_of_the_samples_in_every_stage() -> None:
    for number, run in enumerate(Task(LIFELONG, LIFELONG.variant("replay"), 1, Path("runs")).sequence(), start=1):
        new, *memory = [source.mean_weight(1) for source in run.config().data.train]
        assert len(memory) == number - 1
        assert sum(memory) / (new + sum(memory)) == pytest.approx(1 / 3 if memory else 0, abs=1e-4)


def test_a_run_of_all_at_once_is_no_sequence() -> None:
    together = Task(LIFELONG, LIFELONG.variant("together"), 1, Path("runs"))
    assert together.sequence() == [together] and not together.earlier()
    naive = Task(LIFELONG, LIFELONG.variant("naive"), 1, Path("runs"))
    assert together.config().train.steps == sum(run.config().train.steps for run in naive.sequence())
