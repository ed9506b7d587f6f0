"""Objectives that never have anything to learn from are told of once, and end a run that has no other."""

from pathlib import Path

import pytest

from mmmoe_pretrain.engines.base import StepResult
from mmmoe_pretrain.objectives.counts import StepCounts
from mmmoe_pretrain.train.learning import Learning
from tests.support import tiny_config

PAIR, CAPTIONS = "contrastive/image-text", "captioning"


def learning(root: Path, batch: int, fraction: float = 0.5) -> Learning:
    return Learning(tiny_config(
        root, train={"global_batch_size": batch},
        objectives={"contrastive": {"pairs": {"image-text": 1.0, "audio-text": 0.0}},
                    "captioning": {"weight": 0.5, "fraction": fraction}},
    ))  # fmt: skip


def step(pair: float, caption: float, samples: int = 0, targets: int = 0) -> StepResult:
    counts = StepCounts(100, {"contrastive/audio-text": 0, PAIR: samples, CAPTIONS: targets})
    losses = {"total": pair + caption, "contrastive/audio-text": 0.0, PAIR: pair, CAPTIONS: caption}
    return StepResult(losses, 1.0, counts, ())


def test_an_idle_objective_is_told_of_once_after_ten_steps_and_when_it_begins(tmp_path: Path) -> None:
    """A pair of weight 0 takes no part, so nothing is said of it."""
    watch = learning(tmp_path, batch=4)
    for number in range(1, 13):
        assert watch.add(step(pair=1.0, caption=0.0, samples=4)) == []
        found = watch.warnings()
        assert list(found) == ([CAPTIONS] if number == 10 else [])
        if found:
            assert (
                "no target in 10 steps (40 samples): no sample drawn for it has text and image or" in found[CAPTIONS]
            )
    assert list(watch.idle()) == [CAPTIONS]
    assert watch.add(step(1.0, 2.0)) == [CAPTIONS]
    assert watch.idle() == {}


def test_captions_that_are_seldom_drawn_are_waited_for(tmp_path: Path) -> None:
    """At a fraction of 1/100 ten steps of 4 draw none by chance in two of three runs."""
    watch = learning(tmp_path, batch=4, fraction=0.01)
    for number in range(1, 251):
        watch.add(step(1.0, 0.0))
        assert bool(watch.warnings()) == (number == 250)


def test_no_partner_and_no_negative_are_told_apart(tmp_path: Path) -> None:
    lone, alike = learning(tmp_path, 4), learning(tmp_path, 4)
    for _ in range(10):
        lone.add(step(0.0, 1.0))
        alike.add(step(0.0, 1.0, samples=4))
    assert "no sample with image and text" in lone.warnings()[PAIR]
    assert "no negatives for image-text" in alike.warnings()[PAIR]


def test_a_run_that_learns_nothing_at_all_ends_and_others_go_on(tmp_path: Path) -> None:
    """1,000 samples that captioning, which takes half, was free to use are 2,000: 20 steps of 100."""
    nothing, something, few = (learning(tmp_path, 100) for _ in range(3))
    for _ in range(19):
        nothing.add(step(0.0, 0.0))
        something.add(step(0.0, 1.0))
        nothing.refuse_nothing()
    nothing.add(step(0.0, 0.0))
    with pytest.raises(
        ValueError, match=r"nothing to learn: .*no sample with image and text .*; .*captioning had no"
    ):
        nothing.refuse_nothing()
    something.refuse_nothing(whole_run=True)
    few.refuse_nothing(whole_run=True)
    few.add(step(0.0, 0.0))
    few.refuse_nothing()
    with pytest.raises(ValueError, match="in 1 step "):
        few.refuse_nothing(whole_run=True)
