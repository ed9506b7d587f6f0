"""The record of ``baseline.py`` is still what the code computes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.frozen import baseline
from tests.frozen.baseline import STEPS, Arrays


@pytest.fixture(scope="module")
def record() -> Arrays:
    return baseline.recorded()


@pytest.fixture(scope="module")
def model(record: Arrays) -> PretrainingModel:
    model = PretrainingModel(baseline.config_on_record(record))
    baseline.load_weights(model, record)
    return model


@pytest.mark.parametrize("step", range(STEPS))
def test_the_same_samples_give_the_batch_the_losses_and_the_gradients_on_record(
    record: Arrays, model: PretrainingModel, step: int
) -> None:
    samples = baseline.samples_on_record(record, step)
    batch = baseline.pack_samples(model.config, samples, step)
    for name, array in baseline.packed(batch).items():
        np.testing.assert_array_equal(array, record[f"packed/{step}/{name}"], err_msg=name)
    losses, gradients = baseline.compute(model, batch, step)
    expected = json.loads(str(record[f"losses/{step}"]))
    assert losses.keys() == expected.keys()
    for name, value in expected.items():  # the sums of another processor differ in the last digits
        assert losses[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    numbers = sum(array.size for path, array in record.items() if path.startswith(f"gradients/{step}/"))
    assert sum(gradient.size for gradient in gradients.values()) == numbers
    for name, gradient in gradients.items():
        theirs = baseline.recorded_as(name, record, f"gradients/{step}")
        assert np.linalg.norm(gradient - theirs) <= 1e-4 * max(1e-2, float(np.linalg.norm(theirs))), name


def test_every_part_of_a_run_is_on_record(record: Arrays) -> None:
    losses = json.loads(str(record["losses/0"]))
    parts = {name.split("/")[0] for name in losses}
    assert parts == {"total", "contrastive", "captioning", "aux"}
    assert sum(name.startswith("aux/") for name in losses) >= 10
    assert all(np.abs(array).max() > 0 for path, array in record.items() if path.startswith("gradients/0/")), "idle"
    assert any((record[f"packed/{step}/segments"][1] > 0).any() for step in range(STEPS))  # prefixes
