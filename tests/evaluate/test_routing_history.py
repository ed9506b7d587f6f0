"""Routing over the steps of a log: distances and scores by hand, and logs that are not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.evaluate.routing import history


def record(step: int, *layers: dict[str, Any]) -> str:
    return json.dumps({"step": step, "routing": list(layers)}) + "\n"


def layer(image: list[float], text: list[float], number: int = 1) -> dict[str, Any]:
    """A layer without a token of audio."""
    return {
        "layer": number,
        "tokens": {"image": 10, "audio": 0, "text": 5},
        "load": {"image": image, "audio": [0.0] * len(image), "text": text},
    }


def log_of(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines))
    return path


def test_change_and_specialisation_by_hand(tmp_path: Path) -> None:
    path = log_of(
        tmp_path,
        record(10, layer([0.5, 0.5, 0], [0.5, 0.5, 0])),  # alike
        record(20, layer([0.2, 0.5, 0.3], [0, 0, 1])),
        record(30, layer([1, 0, 0], [0, 0, 1])),  # the expert determines the modality
        '{"step": 40, "rou',  # still being written
    )
    (found,) = history.read(path)
    assert found.modalities == ("image", "audio", "text")
    assert found.steps_R.tolist() == [10, 20, 30]
    np.testing.assert_allclose(found.change_RM, [[0.3, np.nan, 1.0], [0.8, np.nan, 0.0]])  # no audio, no distance
    np.testing.assert_allclose(found.specialisation_R[[0, 2]], [0.0, 1.0], atol=1e-12)


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a record"):
        history.read(log_of(tmp_path, record(1, layer([1, 0], [0, 1])), '{"epoch": 2}\n'))


def test_records_of_another_number_of_experts_are_left_out(tmp_path: Path) -> None:
    path = log_of(
        tmp_path,
        record(1, layer([1, 0], [0, 1]), layer([1, 0], [0, 1], number=3)),
        record(2, layer([1, 0, 0], [0, 1, 0]), layer([1, 0], [0, 1], number=3)),
        record(3, layer([1, 0, 0], [0, 1, 0]), layer([1, 0], [0, 1], number=3)),
    )
    assert [(found.layer, found.steps_R.tolist()) for found in history.read(path)] == [(1, [2, 3]), (3, [1, 2, 3])]


def test_records_of_other_modalities_are_left_out(tmp_path: Path) -> None:
    other = {"layer": 1, "tokens": {"left": 3}, "load": {"left": [0.5, 0.5]}}
    (found,) = history.read(log_of(tmp_path, record(1, layer([1, 0], [0, 1])), record(2, other), record(3, other)))
    assert (found.modalities, found.steps_R.tolist()) == (("left",), [2, 3])


def test_without_a_log_or_with_one_record_there_is_no_history(tmp_path: Path) -> None:
    assert history.read(tmp_path / "metrics.jsonl") == []
    assert history.read(log_of(tmp_path)) == []
    assert history.read(log_of(tmp_path, record(1, layer([1, 0], [0, 1])))) == []
    assert history.read(log_of(tmp_path, record(1), record(2))) == []  # dense


def test_long_logs_are_drawn_in_bins() -> None:
    steps = np.arange(1, 241)
    values = np.where(steps % 2 == 0, np.nan, steps).astype(float)[:, None]
    values[2:4] = np.nan
    drawn, means = history.binned(steps, values)
    assert drawn.tolist() == list(range(2, 241, 2))  # 120 bins of two
    assert means[0] == 1 and np.isnan(means[1]) and means[2] == 5
    np.testing.assert_array_equal(history.binned(steps[:5], values[:5])[0], steps[:5])


def test_the_report_keeps_lines_by_modality_and_the_loads_of_each_step(tmp_path: Path) -> None:
    path = log_of(
        tmp_path, record(10, layer([0.5, 0.5, 0], [0.5, 0.5, 0])), record(20, layer([0.2, 0.5, 0.3], [0, 0, 1]))
    )
    (found,) = history.in_json(history.read(path))
    assert (found["layer"], found["modalities"], found["steps"]) == (1, ["image", "audio", "text"], [10, 20])
    assert found["load_steps"] == [10, 20] and found["load"][1][2] == [0, 0, 1]
    image, audio, text = found["change"]
    assert np.isnan([image[0], *audio, text[0]]).all() and (image[1], text[1]) == pytest.approx((0.3, 1.0))
    image, audio, text = found["experts_used"]
    assert (image[0], *text) == pytest.approx((2, 2, 1)) and np.isnan(audio).all()


def test_loads_of_many_experts_are_kept_of_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, load_RME = np.arange(100), np.full((100, 2, 5), 0.2)
    layers = [history.LayerHistory(number, ("image", "text"), steps, load_RME) for number in range(3)]
    assert [len(found["load"]) for found in history.in_json(layers)] == [history.MAX_LOAD_STEPS] * 3
    monkeypatch.setattr(history, "MAX_LOADS", 240)  # 30 numbers a step
    found = history.in_json(layers)
    assert [len(its["load"]) for its in found] == [8] * 3 and found[0]["load_steps"][-1] == 99
    assert len(found[0]["steps"]) == 100
