"""Which steps are rolled back, which batches are skipped, and loss spikes planted into seeded noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.data.loader import LoadStats, StepData
from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.objectives import StepCounts
from mmmoe_pretrain.train.rollback import (
    MIN_HISTORY,
    WINDOW,
    BadSteps,
    FaultDetector,
    SkippedBatches,
    SpikeDetector,
    read_skipped_batches,
)
from tests.support import tiny_config


def data(step: int) -> StepData:
    return StepData(step, step, [], LoadStats())


def result(skipped: bool, scale: float = 1.0) -> StepResult:
    loss = math.nan if skipped else 1.0
    return StepResult({"total": loss}, 1.0, StepCounts(10, {}), (), skipped=skipped, loss_scale=scale)


def first_bad_steps(tmp_path: Path, skipped: str, scale: float = 1.0, **sections: Any) -> BadSteps | None:
    """``skipped``: a letter a step, x for a skipped one."""
    detector = FaultDetector(tiny_config(tmp_path, faults={"max_skipped_steps": 2}, **sections))
    for step, letter in enumerate(skipped):
        found = detector.add(data(step), result(letter == "x", scale))
        assert detector.in_streak == (letter == "x" and scale == 1.0)
        if found is not None:
            return found
    return None


def test_only_steps_in_a_row_count(tmp_path: Path) -> None:
    assert first_bad_steps(tmp_path, ".xx.xx.x.xx.") is None
    found = first_bad_steps(tmp_path, ".xx.xxxx")
    assert found is not None
    assert (found.kind, found.steps) == ("not finite", range(4, 7))


def test_overflows_above_the_smallest_loss_scale_are_no_faults(tmp_path: Path) -> None:
    half = {"train": {"precision": "fp16", "loss_scale": {"minimum": 1.0}}}
    assert first_bad_steps(tmp_path, "x" * 20, scale=1024.0, **half) is None
    assert first_bad_steps(tmp_path, "x" * 3, scale=1.0, **half) is not None


@pytest.mark.parametrize(
    ("steps", "margin", "resume_step", "window", "batches"),
    [
        (range(6, 8), 1, 4, (5, 9), [0, 1, 2, 3, 4, 9, 10]),
        (range(6, 8), 1, 6, (6, 9), [0, 1, 2, 3, 4, 5, 9]),  # batch 5 is of the checkpoint
        (range(0, 1), 3, 0, (0, 4), [4, 5, 6]),
    ],
)
def test_the_window_has_a_margin_but_no_batch_that_the_checkpoint_has_trained_on(
    steps: range, margin: int, resume_step: int, window: tuple[int, int], batches: list[int]
) -> None:
    skips = SkippedBatches()
    assert skips.skip(BadSteps("not finite", steps, ""), margin, resume_step) == window
    assert [skips.cursor.batch(step) for step in range(len(batches))] == batches
    assert skips.rollbacks == 1


def test_skipped_batches_are_read_back_and_joined_with_a_checkpoint_s(tmp_path: Path) -> None:
    SkippedBatches(Cursor(((5, 9),)), rollbacks=2).write(tmp_path)
    skips = read_skipped_batches(tmp_path)
    skips.add(Cursor(((8, 12), (20, 21))))
    assert (skips.cursor.skipped, skips.rollbacks) == (((5, 12), (20, 21)), 2)
    assert read_skipped_batches(tmp_path / "none") == SkippedBatches()


@pytest.mark.parametrize("text", [
    "", "[]", '{"skipped_batches": [], "rollbacks": 1, "back_to": -1}', '{"skipped_batches": []}',
    '{"skipped_batches": [[3, 1]], "rollbacks": 1}',
])  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "skipped_batches.json").write_text(text)
    with pytest.raises(ValueError, match=r"skipped_batches\.json is damaged"):
        read_skipped_batches(tmp_path)


def noisy(seed: int, steps: int) -> np.ndarray:
    """A loss that falls from 6 to 2 under noise of 0.1."""
    rng = np.random.default_rng(seed)
    return 2 + 4 * np.exp(-np.arange(steps) / 300) + rng.normal(0, 0.1, steps)


def spikes_of(detector: SpikeDetector, losses: np.ndarray | list[float]) -> list[range]:
    return [spike for step, loss in enumerate(losses) if (spike := detector.add(step, float(loss))) is not None]


def test_noise_is_no_spike_unless_the_threshold_is_too_low() -> None:
    """20,000 steps. A normal variable is above 5 deviations once in 3.5 million, three in a row never; half a
    deviation, thrice in a row, has a chance of 0.31 ** 3."""
    assert sum(len(spikes_of(SpikeDetector(5.0, 3), noisy(seed, 2000))) for seed in range(10)) == 0
    assert spikes_of(SpikeDetector(0.5, 3), noisy(0, 2000))


@pytest.mark.parametrize("height,length", [(3.0, 3), (3.0, 10), (20.0, 3)])
def test_every_planted_spike_is_found_at_its_steps(height: float, length: int) -> None:
    for seed in range(10):
        losses = noisy(seed, 1000)
        for start in (200, 500, 900):
            losses[start : start + length] += height
        spikes = spikes_of(SpikeDetector(5.0, 3), losses)
        # 1.0 are 10 deviations of the noise; a window over a falling loss has up to twice its deviation.
        assert {spike.start for spike in spikes} >= {200, 500, 900}
        assert all(any(start <= spike.start and spike.stop <= start + length for start in (200, 500, 900))
                   for spike in spikes)  # fmt: skip


def test_single_high_steps_and_last_digits_of_a_flat_loss_are_no_spike() -> None:
    losses = noisy(0, 1000)
    losses[100::10] += 3.0
    losses[101::100] += 3.0  # and two in a row
    assert not spikes_of(SpikeDetector(5.0, 3), losses)
    assert not spikes_of(SpikeDetector(5.0, 1), [2.0] * 100 + [2.001, 2.0, 2.002] * 10)


def test_losses_that_are_not_finite_are_left_to_others() -> None:
    detector = SpikeDetector(5.0, 2)
    assert not spikes_of(detector, [2.0, math.nan, math.inf] * 100)
    assert [detector.add(step, loss) for step, loss in [(300, 9.0), (301, math.nan), (302, 9.0)]] == [
        None, None, range(300, 303)]  # fmt: skip


def test_a_level_that_stays_becomes_the_normal_one() -> None:
    spikes = spikes_of(SpikeDetector(5.0, 3), [2.0] * WINDOW + [4.0] * 250)
    assert spikes and max(spike.stop for spike in spikes) <= WINDOW + WINDOW + 3


def test_a_detector_made_anew_finds_spikes_after_some_steps() -> None:
    """After a resume: no state is saved."""
    spike = [2.0] * MIN_HISTORY + [50.0]
    assert spikes_of(SpikeDetector(5.0, 1), spike) == [range(MIN_HISTORY, MIN_HISTORY + 1)]
    assert not spikes_of(SpikeDetector(5.0, 1), spike[1:])


@pytest.mark.parametrize("setting", [{"spike_threshold": -1.0}, {"spike_steps": 0}])
def test_settings_that_cannot_work_are_refused(tmp_path: Path, setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"faults.{next(iter(setting))}"):
        tiny_config(tmp_path, faults=setting)
