"""Idle objectives are reported once, and end a run that has no other."""

from pathlib import Path

import pytest

from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.objectives import StepCounts
from mmmoe_pretrain.train.learning import ObjectiveMonitor
from tests.support import objectives, tiny_config

PAIR, CAPTIONS = "contrastive/image-text", "captioning"


def learning(root: Path, batch: int, fraction: float = 0.5) -> ObjectiveMonitor:
    return ObjectiveMonitor(tiny_config(
        root, train={"global_batch_size": batch},
        objectives=objectives({"pairs": {"image-text": 1.0, "audio-text": 0.0}}, {"fraction": fraction}),
    ))  # fmt: skip


def step(pair: float, caption: float, samples: int = 0, targets: int = 0) -> StepResult:
    counts = StepCounts(100, {"contrastive/audio-text": 0, PAIR: samples, CAPTIONS: targets})
    losses = {"total": pair + caption, "contrastive/audio-text": 0.0, PAIR: pair, CAPTIONS: caption}
    return StepResult(losses, 1.0, counts, ())


def test_an_idle_objective_is_reported_once_after_ten_steps_and_when_it_begins(tmp_path: Path) -> None:
    """A pair of weight 0 takes no part, so nothing is said of it."""
    watch = learning(tmp_path, batch=4)
    for number in range(1, 13):
        assert watch.add(number - 1, step(pair=1.0, caption=0.0, samples=4)) == []
        found = watch.warnings()
        assert list(found) == ([CAPTIONS] if number == 10 else [])
        if found:
            assert (
                "no target in 10 steps (40 samples): no sample drawn for it has image and text, or" in found[CAPTIONS]
            )
    assert list(watch.idle()) == [CAPTIONS]
    assert watch.add(12, step(1.0, 2.0)) == [CAPTIONS]
    assert watch.idle() == {}


def test_captions_that_are_seldom_drawn_are_waited_for(tmp_path: Path) -> None:
    """At a fraction of 1/100 ten steps of 4 draw none by chance in two of three runs."""
    watch = learning(tmp_path, batch=4, fraction=0.01)
    for number in range(1, 251):
        watch.add(number - 1, step(1.0, 0.0))
        assert bool(watch.warnings()) == (number == 250)


def test_no_partner_and_no_negative_are_distinguished(tmp_path: Path) -> None:
    lone, alike = learning(tmp_path, 4), learning(tmp_path, 4)
    for number in range(10):
        lone.add(number, step(0.0, 1.0))
        alike.add(number, step(0.0, 1.0, samples=4))
    assert "no sample with image and text" in lone.warnings()[PAIR]
    assert "no negatives for image-text" in alike.warnings()[PAIR]


def test_a_run_in_which_every_objective_is_idle_ends_and_others_continue(tmp_path: Path) -> None:
    """1,000 samples that captioning, which takes half, was free to use are 2,000: 20 steps of 100."""
    nothing, something, few = (learning(tmp_path, 100) for _ in range(3))
    for number in range(19):
        nothing.add(number, step(0.0, 0.0))
        something.add(number, step(0.0, 1.0))
        nothing.raise_if_all_idle()
    nothing.add(19, step(0.0, 0.0))
    with pytest.raises(
        ValueError, match=r"nothing to learn: .*no sample with image and text .*; .*captioning had no"
    ):
        nothing.raise_if_all_idle()
    something.raise_if_all_idle(whole_run=True)
    few.raise_if_all_idle(whole_run=True)
    few.add(0, step(0.0, 0.0))
    few.raise_if_all_idle()
    with pytest.raises(ValueError, match="in 1 step "):
        few.raise_if_all_idle(whole_run=True)


def test_an_objective_whose_weight_begins_later_is_watched_from_then_on(tmp_path: Path) -> None:
    """Captions begin in step 30; until then a 0 means nothing, and no run ends for it."""
    config = tiny_config(
        tmp_path, train={"global_batch_size": 1000},
        objectives=objectives(None, {"fraction": 1.0, "weight": [[29, 0.0], [40, 1.0]]}),
    )  # fmt: skip
    watch = ObjectiveMonitor(config)
    idle = StepResult({"total": 0.0, CAPTIONS: 0.0}, 1.0, StepCounts(100, {CAPTIONS: 0}), ())
    for number in range(39):
        watch.add(number, idle)
        watch.raise_if_all_idle()
        assert not watch.warnings()
    watch.add(39, idle)
    with pytest.raises(ValueError, match="in 10 steps"):
        watch.raise_if_all_idle()
    assert list(watch.warnings()) == [CAPTIONS]
