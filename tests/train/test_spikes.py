"""Spikes planted into seeded noise, and noise without any."""

import math

import numpy as np
import pytest

from mmmoe_pretrain.train.spikes import MIN_HISTORY, SpikeDetector


def noisy(seed: int, steps: int) -> np.ndarray:
    """A loss that falls from 6 to 2 under noise of 0.1."""
    rng = np.random.default_rng(seed)
    return 2 + 4 * np.exp(-np.arange(steps) / 300) + rng.normal(0, 0.1, steps)


def found(detector: SpikeDetector, losses: np.ndarray | list[float]) -> list[range]:
    return [spike for step, loss in enumerate(losses) if (spike := detector.add(step, float(loss))) is not None]


def test_noise_is_no_spike() -> None:
    """20,000 steps. A normal variable is above 5 deviations once in 3.5 million, three in a row never."""
    assert sum(len(found(SpikeDetector(5.0, 3), noisy(seed, 2000))) for seed in range(10)) == 0


def test_a_threshold_too_low_raises_false_alarms() -> None:
    """The count above could be more than 0: half a deviation, thrice in a row, has a chance of 0.31 ** 3."""
    assert found(SpikeDetector(0.5, 3), noisy(0, 2000))


@pytest.mark.parametrize("height,length", [(3.0, 3), (3.0, 10), (20.0, 3)])
def test_every_planted_spike_is_found_at_its_steps(height: float, length: int) -> None:
    for seed in range(10):
        losses = noisy(seed, 1000)
        for start in (200, 500, 900):
            losses[start : start + length] += height
        spikes = found(SpikeDetector(5.0, 3), losses)
        # 1.0 are 10 deviations of the noise; a window over a falling loss has up to twice its deviation.
        assert {spike.start for spike in spikes} >= {200, 500, 900}
        assert all(any(start <= spike.start and spike.stop <= start + length for start in (200, 500, 900))
                   for spike in spikes)  # fmt: skip


def test_single_high_steps_are_no_spike() -> None:
    losses = noisy(0, 1000)
    losses[100::10] += 3.0
    losses[101::100] += 3.0  # and two in a row
    assert not found(SpikeDetector(5.0, 3), losses)


def test_a_flat_loss_that_wavers_in_its_last_digits_is_no_spike() -> None:
    assert not found(SpikeDetector(5.0, 1), [2.0] * 100 + [2.001, 2.0, 2.002] * 10)


def test_losses_that_are_not_finite_are_left_to_others() -> None:
    detector = SpikeDetector(5.0, 2)
    assert not found(detector, [2.0, math.nan, math.inf] * 100)
    assert [detector.add(step, loss) for step, loss in [(300, 9.0), (301, math.nan), (302, 9.0)]] == [
        None, None, range(300, 303)]  # fmt: skip


def test_a_level_that_stays_becomes_the_normal_one() -> None:
    detector = SpikeDetector(5.0, 3, window=40)
    spikes = found(detector, [2.0] * 40 + [4.0] * 100)
    assert spikes and max(spike.stop for spike in spikes) <= 40 + 40 + 3


def test_a_detector_made_anew_needs_some_steps_and_then_agrees() -> None:
    """After a resume: no state is saved."""
    losses = noisy(1, 600)
    losses[500:503] += 2.0
    whole, fresh = SpikeDetector(5.0, 3), SpikeDetector(5.0, 3)
    assert found(whole, losses) == [range(500, 503)]
    assert [fresh.add(step, float(losses[step])) for step in range(400, 503)][-1] == range(500, 503)
    early = SpikeDetector(5.0, 1)
    assert not found(early, [2.0] * (MIN_HISTORY - 1) + [50.0])


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"faults\.spike_threshold"):
        SpikeDetector(0.0, 3)
