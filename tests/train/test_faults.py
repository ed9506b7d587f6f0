"""Runs that meet faults: they skip, roll back, stop and resume, and end with a reason past their budgets."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.objectives import objectives_of
from mmmoe_pretrain.train import checkpointing
from mmmoe_pretrain.train.checkpointing import CheckpointManager
from mmmoe_pretrain.train.loop import train
from mmmoe_pretrain.train.rollback import FaultDetector
from mmmoe_pretrain.train.watchdog import Watchdog
from tests.checkpoint.support import delay_copies
from tests.distributed import run_ranks
from tests.support import objectives, things, tiny_config, write_shards
from tests.train.conftest import SKIPPED
from tests.train.faulty import (
    STEPS,
    at_step,
    config_in,
    copied,
    events,
    failing_saves,
    faulty,
    keep_batches,
    logged,
    losses,
    on_result,
    on_save,
    outcome,
    poison,
    saved,
    signalled,
    steps_of,
)


def batches(path: Path) -> dict[int, int]:
    """The batch that each step was trained on last."""
    rows = [line.split() for line in path.read_text().splitlines()]
    return {int(step): int(batch) for step, batch in rows}


def damage(checkpoint: store.Checkpoint) -> None:
    path = Path(str(checkpoint)) / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        pytest.param({"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param({"engine": "deepspeed", "zero_stage": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_run_that_is_stopped_and_loses_a_worker_and_a_checkpoint_ends_bit_by_bit_like_a_straight_one(
    tmp_path: Path, tiny_data: Path, undisturbed: RunConfig, parallel: dict[str, Any]
) -> None:
    straight = undisturbed
    if parallel:
        straight = config_in(tmp_path / "straight", tiny_data, parallel=parallel)
        run_ranks(2, faulty, straight, SKIPPED)
    config = config_in(tmp_path, tiny_data, parallel=parallel, data={"num_workers": 1})
    reader = 0 if "pipeline_parallel_size" in parallel else 1  # a stage gets its batches from the first one
    kill = partial(at_step, 3, lambda loader: os.kill(loader.worker_pids[0], signal.SIGKILL), rank=reader)
    stop = partial(signalled, 6, signal.SIGUSR1, rank=1)
    assert run_ranks(2, faulty, config, SKIPPED, kill, stop) == [exit_codes.STOPPED] * 2
    assert [event["workers"] for event in events(config, "worker_restarted")] == [1]
    assert run_ranks(2, faulty, config, SKIPPED, delay_copies, partial(signalled, 10)) == [exit_codes.STOPPED] * 2
    damage(store.checkpoints(config.checkpoint_root)[-1])
    assert run_ranks(2, faulty, config, SKIPPED) == [exit_codes.DONE] * 2
    kinds = ("started", "skipped_step", "preempted", "resumed", "checkpoint_damaged", "finished")
    assert [(event["event"], event["step"]) for event in events(config, *kinds)] == [
        ("started", 0), ("skipped_step", 4), ("skipped_step", 5), ("preempted", 6), ("resumed", 6), ("preempted", 10),
        ("checkpoint_damaged", 10), ("resumed", 8), ("finished", STEPS),
    ]  # fmt: skip
    assert "rank_00000.safetensors" in events(config, "checkpoint_damaged")[0]["error"]
    assert steps_of(config) == list(range(1, STEPS + 1))
    np.testing.assert_array_equal(losses(config), losses(straight))


def test_a_run_that_is_asked_to_stop_before_its_first_step_trains_none(
    tmp_path: Path, undisturbed: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a rank failed after the request, and torchrun starts all again."""
    config = copied(undisturbed, tmp_path)
    shutil.rmtree(str(store.checkpoints(config.checkpoint_root)[-1]))  # of the last step
    before = steps_of(config)
    (tmp_path / "stop").write_text("SIGTERM\n")
    monkeypatch.setenv(exit_codes.STOP_FILE, str(tmp_path / "stop"))
    assert run_ranks(2, faulty, config) == [exit_codes.STOPPED] * 2
    assert [event["step"] for event in events(config, "preempted")] == [8]
    assert (saved(config), steps_of(config)) == ([0, 6, 8], before[:8])


def test_a_memory_queue_is_resumed(tmp_path: Path, tiny_data: Path) -> None:
    queue = {"train": {"steps": 6}, "objectives": objectives({"queue_size": 16})}
    straight, config = (config_in(tmp_path / name, tiny_data, **queue) for name in ("straight", "stopped"))
    assert run_ranks(1, faulty, straight) == [exit_codes.DONE]
    assert run_ranks(1, faulty, config, partial(signalled, 3)) == [exit_codes.STOPPED]
    assert run_ranks(1, faulty, config) == [exit_codes.DONE]
    np.testing.assert_array_equal(losses(config), losses(straight))


def test_no_checkpoint_is_made_in_a_streak_of_bad_steps_but_right_behind_it(undisturbed: RunConfig) -> None:
    """Steps 4 and 5 are skipped, and step 4 is due to be saved."""
    assert saved(undisturbed) == [0, 6, 8, 12]


def test_a_run_never_starts_from_step_0_over_damaged_checkpoints(tmp_path: Path, undisturbed: RunConfig) -> None:
    config = copied(undisturbed, tmp_path)
    for checkpoint in store.checkpoints(config.checkpoint_root):
        damage(checkpoint)
    with pytest.raises(AssertionError, match=r"none of the 4 checkpoints in .* can be used: .*is damaged"):
        run_ranks(2, train, config)
    assert steps_of(config) == list(range(1, STEPS + 1))


def test_too_many_bad_steps_roll_the_run_back_and_their_batches_are_skipped(tmp_path: Path, tiny_data: Path) -> None:
    faults = {"max_skipped_steps": 2, "skip_margin": 1}
    config = config_in(tmp_path, tiny_data, data={"num_workers": 1}, faults=faults)
    poisoned, noted = partial(poison, [6, 7, 8], rank=1), partial(keep_batches, tmp_path / "b")
    run_ranks(2, faulty, config, poisoned, noted, delay_copies)
    (rollback,) = events(config, "rollback")
    # Steps 7, 8 and 9 read batches 6, 7 and 8; the checkpoint knows batches 0 to 3, so a margin fits before them.
    assert (rollback["step"], rollback["to_step"], rollback["skipped_batches"]) == (9, 4, [5, 10])
    assert "not finite in 3 steps in a row" in rollback["reason"]
    assert steps_of(config) == list(range(1, STEPS + 1))
    assert batches(tmp_path / "b") == {step: step if step < 5 else step + 5 for step in range(STEPS)}
    assert all(np.isfinite(record["losses"]["total"]) for record in logged(config))
    meta = store.read_meta(store.checkpoints(config.checkpoint_root)[-1])
    assert meta["skipped_batches"] == [[5, 10]]
    assert meta["progress"]["updates"] == STEPS
    tokens = [record["tokens"] for record in logged(config)]
    assert max(tokens) < 1.5 * median(tokens), "the first record after a rollback is of its step alone"


def crash_before_the_rewind() -> None:
    """With the newest checkpoint still of steps that are to be undone."""
    FaultDetector.in_streak = property(lambda _: False)  # type: ignore[method-assign, assignment]
    store.rewind = lambda _: os._exit(9)  # type: ignore[assignment]


def crash_after_the_rollback() -> None:
    at_step(7, lambda _: at_step(7, lambda _: os._exit(9)))  # the second time that step 7 begins


def test_a_crash_during_or_after_a_rollback_loses_nothing_and_skips_nothing_twice(
    tmp_path: Path, tiny_data: Path
) -> None:
    straight, *crashed = (
        config_in(tmp_path / name, tiny_data, faults={"max_skipped_steps": 2, "max_rollbacks": 1, "skip_margin": 0})
        for name in ("straight", "before", "after")
    )
    bad = partial(poison, [6, 7, 8])
    run_ranks(1, faulty, straight, bad)
    crashes = [(crash_before_the_rewind, [4, 8]), (crash_after_the_rollback, [0, 4])]
    for config, (crash, left) in zip(crashed, crashes, strict=True):
        with pytest.raises(AssertionError, match=r"died with \[9\]"):
            run_ranks(1, faulty, config, bad, crash)
        assert saved(config) == left
        kept = tmp_path / crash.__name__
        run_ranks(1, faulty, config, bad, partial(keep_batches, kept))
        assert [event["step"] for event in events(config, "resumed")] == [4]
        assert batches(kept) == {step: step if step < 6 else step + 3 for step in range(4, STEPS)}
        np.testing.assert_array_equal(losses(config), losses(straight))
        skipped = json.loads((config.run_dir / "skipped_batches.json").read_text())
        assert skipped == {"skipped_batches": [[6, 9]], "rollbacks": 1}


def test_past_its_rollbacks_a_run_ends_and_names_batches_and_samples(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data, faults={"max_skipped_steps": 0, "max_rollbacks": 1, "skip_margin": 0})
    with pytest.raises(AssertionError) as failed:
        run_ranks(2, faulty, config, partial(poison, range(2, 99)))
    assert [event["to_step"] for event in events(config, "rollback")] == [0]  # there is no other checkpoint yet
    message = str(failed.value)
    assert "steps 3 to 3 (batches 3 to 3): total, " in message
    assert "not finite in 1 step in a row; their first samples on this rank: thing-" in message
    assert "Rollbacks so far: 1, and faults.max_rollbacks is 1" in message


@pytest.mark.parametrize(("action", "ranks"), [("warn", 1), ("rollback", 2)])
def test_a_loss_spike_is_logged_and_rolled_back_if_set(
    tmp_path: Path, tiny_data: Path, action: str, ranks: int
) -> None:
    """Of two ranks one alone sees it: what differs in the last bit may lie on both sides of the bound."""
    faults = {"spike_threshold": 50.0, "spike_steps": 2, "spike_action": action, "skip_margin": 0}
    config = config_in(tmp_path, tiny_data, train={"steps": 28}, checkpoint={"every": 12, "keep_last": 1},
                       faults=faults)  # fmt: skip

    def spike() -> None:
        def change(engine: Any, result: Any) -> Any:
            here = os.environ["RANK"] == "0" and 24 <= engine.progress().steps <= 25
            if here and events(config)[-1]["event"] != "rollback":
                result.losses["total"] = 1e6
            return result

        on_result(change)

    run_ranks(ranks, faulty, config, spike)
    (event,) = events(config, "spike")
    assert (event["steps"], event["step"], event["loss"]) == ([24, 25], 25, 1e6)
    found = [(e["step"], e["to_step"], e["skipped_batches"]) for e in events(config, "rollback")]
    # Step 24 was due to be saved, in place of the only checkpoint before the spike.
    assert found == ([(25, 12, [23, 25])] if action == "rollback" else [])
    assert steps_of(config) == list(range(1, 29))


def note_phases() -> None:
    """Fails where the run ends for its saves in another phase than "save"."""
    phases: list[str] = []
    beat, give_up = Watchdog.beat, CheckpointManager.give_up

    def note(watchdog: Watchdog, step: int, phase: str) -> None:
        phases.append(phase)
        beat(watchdog, step, phase)

    def note_failures(manager: CheckpointManager, failures: int) -> None:
        assert phases[-1] == "save", "it may wait for a save in flight, and longer than a step may take"
        give_up(manager, failures)

    Watchdog.beat, CheckpointManager.give_up = note, note_failures  # type: ignore[method-assign, assignment]


def test_saves_that_fail_are_reported_and_end_the_run_past_their_budget(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data, checkpoint={"every": 2, "max_failures": 1})
    with pytest.raises(AssertionError, match=r"ValueError: 2 saves failed in a row, .*is 1; the last one: .*No sp"):
        run_ranks(2, faulty, config, partial(failing_saves, [2, 6, 8]), note_phases)
    assert [event["step"] for event in events(config, "saved")] == [0, 4]
    assert [event["step"] for event in events(config, "save_failed")] == [2, 6, 8]


@pytest.mark.parametrize("step", [0, STEPS])
def test_a_run_that_cannot_save_its_first_or_last_step_ends_with_an_error(
    tmp_path: Path, tiny_data: Path, step: int
) -> None:
    config = config_in(tmp_path, tiny_data)
    with pytest.raises(AssertionError, match=f"step {step} could not be saved: .*No space left"):
        run_ranks(1, faulty, config, partial(failing_saves, [step]))


def test_logs_that_cannot_be_written_end_no_run(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data, train={"heatmap_every": 2})
    config.run_dir.mkdir(parents=True)
    for name in ("events.jsonl", "metrics.jsonl", "routing_training.png.tmp"):
        (config.run_dir / name).symlink_to("/dev/full")
    (config.run_dir / "tensorboard").touch()  # where a folder must be
    assert run_ranks(2, train, config) == [exit_codes.DONE] * 2
    assert saved(config) == [8, 12]


def test_bad_samples_are_counted_over_restarts_and_without_rolled_back_steps_and_end_the_run_past_their_budget(
    tmp_path: Path, tiny_data: Path
) -> None:
    rows = things(16)
    write_shards(tmp_path / "broken", rows, corrupt=(rows[3]["key"], rows[12]["key"]))

    def config(steps: int, share: float) -> RunConfig:
        """Each step reads all sixteen."""
        data = {"train": [{"path": str(tmp_path / "broken")}], "max_bad_fraction": share}
        train = {"steps": steps, "global_batch_size": 16}
        return config_in(tmp_path, tiny_data, data=data, train=train, faults={"max_skipped_steps": 0})

    generous = config(STEPS, 0.5)
    run_ranks(2, faulty, generous, partial(poison, [5]), partial(signalled, 8))
    meta = store.read_meta(store.checkpoints(generous.checkpoint_root)[-1])
    records = logged(generous)
    tokens = sum(record["tokens"] for record in records)
    assert meta["samples"] == {"read": 8 * 16, "bad": 16, "cut": {}, "tokens": tokens}
    run_ranks(1, train, generous)
    records = logged(generous)
    assert records[-1]["tokens_total"] == sum(record["tokens"] for record in records) > tokens
    assert len(events(generous, "rollback")) == 1
    assert [record["bad_samples"] for record in logged(generous)] == [2 * step for step in range(1, STEPS + 1)]
    # 2 of 16 may be chance where 1 in 50 is allowed; 26 of 208 are not.
    with pytest.raises(AssertionError, match="26 of 208 samples read were bad"):
        run_ranks(1, train, config(STEPS + 9, 0.02))


def fail(_: Any) -> None:
    raise ValueError("this rank's disk is gone")


def endless_saves() -> None:
    """Rank 0 is slow to write every step but the first."""
    on_save(lambda step: time.sleep(60) if step and os.environ["RANK"] == "0" else None)


@pytest.mark.parametrize("saves", [(), (endless_saves,)], ids=["", "while a save is in flight"])
def test_a_rank_that_fails_ends_the_others_and_nobody_waits(
    tmp_path: Path, tiny_data: Path, saves: tuple[Callable[[], None], ...]
) -> None:
    config = config_in(tmp_path, tiny_data, checkpoint={"every": 2})
    other, failed = run_ranks(2, outcome, config, *saves, partial(at_step, 3, fail, rank=1), timeout=45)
    assert failed == "ValueError: this rank's disk is gone"
    assert "closed" in other or "Connection" in other or "reset" in other, other


def test_a_rank_that_hangs_ends_the_run_before_its_collectives_do(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data, faults={"hang_minutes": 0.05})
    spin = partial(at_step, 5, lambda _: time.sleep(80), rank=1)
    with pytest.raises(AssertionError, match=r"died with .*\b76\b"):
        run_ranks(2, faulty, config, spin, timeout=45)
    (message,) = (config.run_dir / "hangs").glob("*/message.txt")
    assert "The others wait for rank 1 (behind the others)" in message.read_text(encoding="utf-8")


def test_a_loss_is_compared_without_its_weight_and_not_where_that_is_0(tmp_path: Path, tiny_data: Path) -> None:
    """The weighted loss rises from 0 with its weight: by it the first step would be the best."""
    schedule = objectives(captioning={"fraction": 1.0, "weight": [[1, 0.0], [4, 1.0]]})
    keep = {"every": 1, "keep_last": 1, "keep_best": 1, "best_metric": "captioning"}
    config = config_in(tmp_path, tiny_data, checkpoint=keep, objectives=schedule, train={"steps": 5})
    run_ranks(1, train, config)
    weighted = [record["losses"]["captioning"] for record in logged(config)]
    assert weighted == sorted(weighted) and weighted[:2] == [0, 0]
    best = min((3, 4, 5), key=lambda step: weighted[step - 1] * 3 / (step - 2))
    kept = {path.name for path in (config.run_dir / "checkpoints").glob("step_*")}
    assert kept == {f"step_{best:08}", "step_00000005"}


@pytest.mark.parametrize("metric, weight, warned", [
    ("held_out/total", [[0, 0.0], [9, 1.0]], "weight of captioning changes .* weight: held_out/captioning$"),
    ("total", [[3, 1.0], [4, 0.5]], "weight of captioning changes during .* their weight: captioning$"),
    ("held_out/total", 0.5, ""),
    ("held_out/total", [[0, 0.5], [9, 0.5]], ""),
    ("held_out/total", [[5, 1.0], [9, 2.0]], ""),  # after the last of 5 steps
    ("held_out/total", [[4, 1.0], [9, 2.0]], "changes"),  # scored with the weight of the next step
    ("total", [[4, 1.0], [9, 2.0]], ""),
    ("held_out/captioning", [[0, 0.0], [9, 1.0]], ""),
])  # fmt: skip
def test_totals_of_different_weights_are_compared_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    metric: str, weight: Any, warned: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(checkpointing, "Saver", lambda *_: None)
    config = tiny_config(
        tmp_path, train={"steps": 5}, checkpoint={"every": 1, "keep_best": 1, "best_metric": metric},
        evaluate={"validation": "x", "every": 1}, objectives=objectives(captioning={"weight": weight}),
    )  # fmt: skip
    model = SimpleNamespace(loss_names=("captioning",), objectives=objectives_of(config))
    context = SimpleNamespace(config=config, engine=SimpleNamespace(models=[model]),
                              host=SimpleNamespace(storage=None), log=logging.getLogger("run"))  # fmt: skip
    checkpointing.CheckpointManager(context, print)
    assert bool(caplog.text) == bool(warned) and re.search(warned, caplog.text.strip())


def test_a_metric_that_is_no_loss_is_refused_before_the_first_step(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data, checkpoint={"every": 2, "keep_best": 1, "best_metric": "accuracy"})
    with pytest.raises(AssertionError, match="best_metric 'accuracy' is not a loss of this run: total, contrast"):
        run_ranks(1, train, config)
    assert events(config) == []
