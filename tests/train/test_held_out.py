"""Held-out losses and scores in training: what they are, that they change nothing, and what is refused."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.sources import overlap
from mmmoe_pretrain.engines.base import Engine
from mmmoe_pretrain.evaluate.features import HeldOut
from mmmoe_pretrain.evaluate.run import evaluate
from mmmoe_pretrain.train import held_out
from mmmoe_pretrain.train.held_out import HeldOutScores, Validation, higher_is_better
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.support import things, tiny_config, write_shards
from tests.train.faulty import config_in, events, faulty, logged, losses, on_save, saved, steps_of


def scored(root: Path, tiny_data: Path, **sections: Any) -> RunConfig:
    """A run of 8 steps that is scored on 24 other samples every second step."""
    write_shards(root / "validation", things(72)[48:], corrupt=("thing-050",))
    evaluation = {"validation": str(root / "validation"), "every": 2, "min_items": 2}
    sections = {"train": {"steps": 8, "global_batch_size": 16, "num_microbatches": 2, "log_every": 3},
                "evaluate": evaluation, **sections}  # fmt: skip
    return config_in(root, tiny_data, **sections)


def test_scores_are_those_of_mmmoe_evaluate_and_training_is_the_same(tmp_path: Path, tiny_data: Path) -> None:
    config = scored(tmp_path, tiny_data, checkpoint={"every": 8})
    run_ranks(2, train, config)
    records = {record["step"]: record for record in logged(config)}
    assert sorted(records) == [1, 2, 3, 4, 6, 8], (
        "the first and every third step are logged, and those that are scored"
    )
    found = records[8]["held_out"]
    assert "held_out" not in records[3]
    test = str(tmp_path / "validation")
    report = evaluate(config.run_dir, [test], out=tmp_path / "report", overrides=["evaluate.keep_seen_texts=true"])
    wanted = {row["metric"]: row["value"] for row in report.results if row["metric"] in found["scores"]}
    assert len(wanted) == len(found["scores"]) > 15
    assert found["scores"] == pytest.approx(wanted, rel=1e-4)
    assert found["samples"] == 24
    assert found["losses"]["total"] == pytest.approx(sum(v for k, v in found["losses"].items() if k != "total"))
    plain = config_in(tmp_path / "plain", tiny_data, train=config.train.model_dump())
    run_ranks(2, train, plain)
    assert steps_of(plain) == [1, 3, 6, 8] and "held_out" not in records[1]
    assert losses(plain).tolist() == [list(records[step]["losses"].values()) for step in (1, 3, 6, 8)]


def test_deep_cca_is_scored_after_linear_cca_as_by_mmmoe_evaluate(tmp_path: Path, tiny_data: Path) -> None:
    cca = {"kind": "deep_cca", "pairs": {"image-text": 1.0}, "cached": True}
    best = {"every": 2, "keep_best": 1, "best_metric": "held_out/text_to_image_r1"}
    config = scored(
        tmp_path,
        tiny_data,
        objectives={"cca": cca},
        checkpoint=best,
        train={"steps": 2, "global_batch_size": 16, "num_microbatches": 2, "log_every": 2},
    )
    run_ranks(2, train, config)
    found = logged(config)[-1]["held_out"]
    overrides = ["evaluate.keep_seen_texts=true"]
    report = evaluate(config.run_dir, [str(tmp_path / "validation")], out=tmp_path / "report", overrides=overrides)
    wanted = {row["metric"]: row["value"] for row in report.results if row["metric"] in found["scores"]}
    names = {f"{a}_to_{b}_r{k}" for a, b in (("image", "text"), ("text", "image")) for k in (1, 5, 10)}
    assert wanted.keys() == found["scores"].keys() == names
    assert found["scores"] == pytest.approx(wanted, rel=1e-4)
    assert "image and text are compared after linear CCA, fitted on 48 training samples" in report.notes


def test_the_checkpoints_with_the_best_held_out_score_are_kept(tmp_path: Path, tiny_data: Path) -> None:
    best = {"every": 2, "keep_last": 1, "keep_best": 1, "best_metric": "held_out/aux/z"}
    config = scored(tmp_path, tiny_data, checkpoint=best, optimizer={"learning_rate": 0.3, "warmup_steps": 0})
    run_ranks(1, train, config)
    by_step = {r["step"]: r["held_out"]["losses"]["aux/z"] for r in logged(config) if "held_out" in r}
    lowest = min(by_step, key=lambda step: by_step[step])
    assert lowest < 8, "logits grow at this learning rate"
    assert saved(config) == [lowest, 8]


def test_recall_is_the_better_the_higher() -> None:
    found = HeldOutScores({"total": 2.0}, {"image_to_text_r10": 0.25}, 8, 0.1)
    assert found.metric("image_to_text_r10") == -0.25 and found.metric("total") == 2.0
    assert not any(map(higher_is_better, ("captions_perplexity", "total", "task_calibration_error", "captions_wer")))
    assert all(map(higher_is_better, ("task_accuracy", "task_accuracy_balanced", "task_auroc")))


@pytest.mark.parametrize("name", ["image_to_txt_r1", "audio_to_text_r1"])
def test_a_best_metric_that_is_no_score_of_these_samples_is_refused_at_the_start(
    tmp_path: Path, tiny_data: Path, name: str
) -> None:
    """Audio is scored under the names of its kinds, which only the samples tell."""
    best = {"every": 2, "keep_best": 1, "best_metric": f"held_out/{name}"}
    config = scored(tmp_path, tiny_data, checkpoint=best)
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"by": {"audio": "language"}})})
    with pytest.raises(AssertionError, match=rf"held_out/{name} is none of .*: held_out/total, held_out/co"):
        run_ranks(1, train, config)
    assert not config.run_dir.exists()


def decodes(config: RunConfig, most_kept: int) -> int:
    """How many held-out samples a run decodes."""
    plain, count = held_out.decode, itertools.count()

    def counted(*args: Any, **settings: Any) -> Any:
        next(count)
        return plain(*args, **settings)

    held_out.decode, held_out.MOST_KEPT = counted, most_kept  # type: ignore[assignment]
    assert train(config) == exit_codes.DONE
    return next(count)


def test_held_out_samples_are_decoded_once_up_to_a_limit_and_the_scores_are_the_same(
    tmp_path: Path, tiny_data: Path
) -> None:
    """24 samples, looked at for the names of the scores and scored twice."""
    best = {"every": 2, "keep_best": 1, "best_metric": "held_out/image_to_text_r1"}
    settings = {"steps": 4, "global_batch_size": 8, "num_microbatches": 1}
    runs = [scored(tmp_path / str(i), tiny_data, checkpoint=best, train=settings) for i in range(2)]
    assert run_ranks(1, decodes, runs[0], 1 << 30) == [24]
    assert run_ranks(1, decodes, runs[1], 0) == [3 * 24]
    assert held_out_of(runs[0]) == held_out_of(runs[1])


def signalled_in_evaluation(step: int) -> None:
    """Rank 1 gets the signal in the first half of the evaluation after ``step``, whose second half is not made."""
    plain, began = Validation._step, []

    def one_step(validation: Validation, engine: Engine, *args: Any) -> Any:
        if engine.steps_done == step:
            began.append(step)
            assert len(began) == 1, "the evaluation goes on"
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return plain(validation, engine, *args)

    Validation._step = one_step  # type: ignore[method-assign]


def held_out_of(config: RunConfig) -> dict[int, Any]:
    records = {r["step"]: r["held_out"] for r in logged(config) if "held_out" in r}
    return {step: {key: value for key, value in found.items() if key != "seconds"} for step, found in records.items()}


def metrics_of(config: RunConfig) -> dict[int, Any]:
    return {found.step: store.read_meta(found).get("metric") for found in store.checkpoints(config.checkpoint_root)}


def test_an_interrupted_run_has_the_scores_of_an_undisturbed_one(tmp_path: Path, tiny_data: Path) -> None:
    """Stopped in the evaluation of step 2 and in that of the last step."""
    best = {"every": 2, "keep_last": 9, "keep_best": 1, "best_metric": "held_out/total"}
    train_settings = {"steps": 4, "global_batch_size": 16, "num_microbatches": 2, "log_every": 9}
    plain, stopped = (
        scored(tmp_path / name, tiny_data, checkpoint=best, train=train_settings) for name in ("plain", "stopped")
    )
    run_ranks(2, train, plain)
    for step in (2, 4):
        assert run_ranks(2, faulty, stopped, partial(signalled_in_evaluation, step)) == [exit_codes.STOPPED] * 2
        assert step not in held_out_of(stopped) and steps_of(stopped)[-1] == step, (
            "the record of a stop has no scores"
        )
    assert run_ranks(2, faulty, stopped) == [exit_codes.DONE] * 2
    assert held_out_of(stopped) == held_out_of(plain) and [*held_out_of(plain)] == [2, 4]
    assert metrics_of(stopped) == metrics_of(plain) and len({*metrics_of(plain).values()} - {None}) == 2
    assert steps_of(stopped) == steps_of(plain) == [1, 2, 4]
    assert [event["event"] for event in events(stopped, "preempted", "finished")] == ["preempted"] * 2 + ["finished"]


def slow_saves(rank: int) -> None:
    on_save(lambda step: time.sleep(1.0) if dist.get_rank() == rank and step else None)


def test_an_evaluation_beside_a_save_in_flight_does_not_meet_its_messages(tmp_path: Path, tiny_data: Path) -> None:
    """Rank 1 writes for a second, in which the next step is scored."""
    config = scored(tmp_path, tiny_data, train={"steps": 2, "global_batch_size": 16}, checkpoint={"every": 1})
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"every": 1})})
    assert run_ranks(2, faulty, config, partial(slow_saves, 1)) == [exit_codes.DONE] * 2
    assert saved(config) == [1, 2] and [*held_out_of(config)] == [1, 2]


def train_with_a_broken_feature(config: RunConfig, value: float) -> int:
    plain = held_out.held_out

    def broken(*args: Any, **more: Any) -> HeldOut:
        found = plain(*args, **more)
        found.features["image"][0, 0] = value
        return found

    held_out.held_out = broken  # type: ignore[assignment]
    return train(config)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_feature_that_is_not_finite_ends_no_run(tmp_path: Path, tiny_data: Path, value: float) -> None:
    best = {"every": 2, "keep_last": 1, "keep_best": 1, "best_metric": "held_out/image_to_text_r1"}
    config = scored(tmp_path, tiny_data, train={"steps": 4, "global_batch_size": 16}, checkpoint=best)
    run_ranks(1, train_with_a_broken_feature, config, value)
    found = logged(config)[-1]["held_out"]["scores"]
    assert found["image_to_text_r1"] is None and found["text_to_image_r1"] is None
    assert found["audio_to_text_r1"] is not None and found["captioning_perplexity"] > 1
    assert saved(config) == [4], "no checkpoint is the best by a number that is not known"


@pytest.mark.parametrize(
    ("evaluation", "checkpoint", "message"),
    [
        ({"every": 5}, {}, "evaluate.validation names none; name shards that are not trained on"),
        ({"every": 5, "validation": "pipe:cat a.tar"}, {}, "evaluate.validation names the output of a command"),
        ({"every": 3, "validation": "a"}, {"every": 8, "keep_best": 1, "best_metric": "held_out/total"},
         "known every evaluate.every 3 steps, and checkpoints are saved every 8"),
        ({}, {"keep_best": 1, "best_metric": "held_out/total"}, "set evaluate.every to a divisor"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(
    tmp_path: Path, evaluation: dict[str, Any], checkpoint: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, evaluate=evaluation, checkpoint=checkpoint)


def test_samples_that_are_trained_on_are_refused(tmp_path: Path, tiny_data: Path) -> None:
    """One of 24 is a copy under another key, with another JSON."""
    config = scored(tmp_path, tiny_data)
    rows = [*things(72)[49:], {**things(7)[6], "key": "copied", "image_of": "thing-006", "group": "other"}]
    write_shards(tmp_path / "validation", rows)
    with pytest.raises(AssertionError, match=r"evaluate.validation has 1 of 24 samples that are trained on, too: "
                       r"copied of 00000.tar is thing-006 of 00000.tar; remove them"):  # fmt: skip
        run_ranks(2, train, config)
    assert not (config.run_dir / "metrics.jsonl").exists(), "nothing was trained"


class Clips:
    """A source of samples of 200 bytes each."""

    def __init__(self, contents: list[bytes]) -> None:
        self._contents = contents
        self.modalities = Audio()

    def __len__(self) -> int:
        return len(self._contents)

    def sizes_of(self, indices: np.ndarray, name: str) -> np.ndarray:
        return np.full(len(indices), 200)

    def read(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(members={"wav": self._contents[index]})

    def key(self, index: int) -> str:
        return f"clip-{index}"

    def places(self, index: int) -> list[str]:
        return ["a/0.tar"]


class Audio(dict[str, None]):
    def __init__(self) -> None:
        super().__init__(audio=None)

    def members_read(self, members: tuple[str, ...]) -> dict[str, str]:
        return {"audio": "wav"}


@pytest.mark.parametrize("place, found", [(overlap.MOST_READ - 1, True), (overlap.MOST_READ, False)])
def test_samples_of_equal_sizes_that_are_not_read_are_told(
    place: int, found: bool, caplog: pytest.LogCaptureFixture
) -> None:
    others: Any = Clips([b"%d" % i for i in range(overlap.MOST_READ + 1)])
    one: Any = Clips([b"%d" % place])
    assert (overlap.overlap([(one, 0)], [others]) is not None) == found
    assert "mmmoe-data dedup --against compares them all" in caplog.text
