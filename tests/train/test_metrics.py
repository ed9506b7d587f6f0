"""The log of a run: JSON lines, truncation on resume, the picture and TensorBoard's events."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmmoe_pretrain.train.metrics import LayerRouting, MetricsLog, StepRecord, scalars, truncate_after


def layer_routing(layer: int = 1) -> LayerRouting:
    """Four experts: image uses 0 and 1, audio has no tokens, text uses 1 alone."""
    return LayerRouting(
        layer=layer,
        tokens_M=np.array([300.0, 0.0, 100.0]),
        load_ME=np.array([[0.5, 0.5, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]),
        entropy_M=np.array([0.75, 0.0, 0.25]),
        marginal_entropy_M=np.array([0.7, 0.0, 0.1]),
        dropped_M=np.array([0.125, 0.0, 0.0]),
    )


def record(step: int, total: float = 3.0, routing: bool = True) -> StepRecord:
    return StepRecord(
        step=step,
        losses={"total": total, "contrastive/image-text": total - 0.5, "aux/global_entropy/image": 0.5},
        learning_rate=1e-3,
        grad_norm=0.8,
        tokens=4000,
        seconds=2.0,
        data_seconds=0.5,
        bad_samples=1,
        routing=(layer_routing(),) if routing else (),
    )


def read_log(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_events(run_dir: Path) -> EventAccumulator:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return events


def test_a_record_becomes_one_json_line_with_modalities_by_name(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(record(10))
        (line,) = read_log(tmp_path)  # flushed before the log is closed
    assert line["step"] == 10
    assert line["losses"] == {"total": 3.0, "contrastive/image-text": 2.5, "aux/global_entropy/image": 0.5}
    assert (line["tokens"], line["seconds"], line["data_seconds"], line["bad_samples"]) == (4000, 2.0, 0.5, 1)
    assert line["routing"] == [
        {
            "layer": 1,
            "tokens": {"image": 300.0, "audio": 0.0, "text": 100.0},
            "load": {"image": [0.5, 0.5, 0.0, 0.0], "audio": [0.0] * 4, "text": [0.0, 1.0, 0.0, 0.0]},
            "entropy": {"image": 0.75, "audio": 0.0, "text": 0.25},
            "marginal_entropy": {"image": 0.7, "audio": 0.0, "text": 0.1},
            "dropped": {"image": 0.125, "audio": 0.0, "text": 0.0},
        }
    ]


def test_a_loss_that_is_not_finite_is_null_and_the_line_stays_valid_json(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(record(1, total=float("nan")))
    assert read_log(tmp_path)[0]["losses"]["total"] is None


def test_resume_drops_the_steps_past_the_checkpoint(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        for step in (10, 20, 30, 40):
            log.write(record(step, total=1.0))
    with MetricsLog(tmp_path, resume_step=20) as log:
        log.write(record(30, total=2.0))
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert [line["losses"]["total"] for line in lines] == [1.0, 1.0, 2.0]
    totals = [(event.step, event.value) for event in read_events(tmp_path).Scalars("1_loss/total")]
    assert totals == [(10, 1.0), (20, 1.0), (30, 2.0)]


def test_a_new_start_empties_the_log(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(record(10))
    MetricsLog(tmp_path).close()
    assert read_log(tmp_path) == []


def test_a_torn_last_line_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    truncate_after(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_foreign_line_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is no record"):
        truncate_after(path, 5)
    assert path.read_text().count("\n") == 3


def test_load_over_even_weighs_modalities_by_their_tokens() -> None:
    # Assignments by expert: 300 * (0.5, 0.5, 0, 0) + 100 * (0, 1, 0, 0) = (150, 250, 0, 0) of 400,
    # and an even share is 100.
    np.testing.assert_allclose(layer_routing().load_over_even_E, [1.5, 2.5, 0.0, 0.0])


def test_tensorboard_gets_derived_values_under_ordered_groups() -> None:
    values = dict(scalars(record(10)))
    assert values["1_loss/total"] == 3.0
    assert values["1_loss/contrastive/image-text"] == 2.5
    assert values["4_auxiliary_loss/global_entropy/image"] == 0.5
    assert values["2_routing/load_over_even_max"] == 2.5
    assert values["2_routing/dead_experts"] == 2
    assert values["2_routing/dropped/image"] == 0.125
    assert values["6_layers/01/entropy/text"] == 0.25
    assert values["5_speed/tokens_per_second"] == 2000
    assert values["5_speed/data_wait_fraction"] == 0.25


def test_events_can_be_read_by_tensorboard(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, heatmap_every=20) as log:
        for step in (10, 20, 30):
            log.write(record(step))
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("3_optimizer/learning_rate")] == [10, 20, 30]
    # One at step 20, and one of the last routing when the log is closed.
    assert [event.step for event in events.Images("routing")] == [20, 30]


def test_the_picture_is_drawn_at_the_first_record_past_each_multiple(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, heatmap_every=25) as log:
        log.write(record(20))
        assert not (tmp_path / "routing_training.png").exists()
        log.write(record(30))
        assert (tmp_path / "routing_training.png").exists()


def test_the_picture_shows_something(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, heatmap_every=1) as log:
        log.write(record(1))
    with Image.open(tmp_path / "routing_training.png") as image:
        assert image.width > 400 and image.height > 150
        colours = np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)
    assert (tmp_path / "routing_training.png").stat().st_size > 5_000
    # Viridis at 100% (text uses expert 1 alone) and at 0%, and the grey of the absent modality.
    for expected in ((253, 231, 36), (68, 1, 84), (228, 228, 228)):
        assert np.abs(colours - np.array(expected)).max(axis=1).min() <= 1, expected
    assert not list(tmp_path.glob("*.tmp"))


def test_a_dense_model_logs_without_routing(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, heatmap_every=1) as log:
        log.write(record(1, routing=False))
    assert read_log(tmp_path)[0]["routing"] == []
    assert not (tmp_path / "routing_training.png").exists()
    assert not [tag for tag in read_events(tmp_path).Tags()["scalars"] if "routing" in tag]
