"""Runs that meet faults: they skip, roll back, stop and resume, and end with a reason past their budgets."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.checkpoint import saver, store
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.train.checkpointing import CheckpointManager
from mmmoe_pretrain.train.journal import read_events
from mmmoe_pretrain.train.loop import train
from mmmoe_pretrain.train.rollback import FaultDetector
from mmmoe_pretrain.train.watchdog import Watchdog
from tests.distributed import run_ranks
from tests.support import objectives, things, write_shards
from tests.train.faulty import (
    SHORT,
    STEPS,
    at_step,
    failing_saves,
    faulty,
    keep_batches,
    on_result,
    poison,
)
from tests.train.test_loop import config_in, logged, losses


def run_in(path: Path, tiny_data: Path, **sections: Any) -> RunConfig:
    return config_in(path, tiny_data, **{"train": SHORT, "checkpoint": {"every": 4}, **sections})


def events(config: RunConfig, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in read_events(config.run_dir) if not kinds or event["event"] in kinds]


def steps_of(config: RunConfig) -> list[int]:
    return [record["step"] for record in logged(config)]


def batches(path: Path) -> dict[int, int]:
    """The batch that each step was trained on last."""
    rows = [line.split() for line in path.read_text().splitlines()]
    return {int(step): int(batch) for step, batch in rows}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> np.ndarray:
    """The losses of a run on two ranks."""
    config = run_in(tmp_path_factory.mktemp("undisturbed"), tiny_data)
    run_ranks(2, train, config)
    return losses(config)


def outcome(config: RunConfig, *faults: Callable[[], None]) -> str:
    """How a rank ends, in a word."""
    try:
        return f"code {faulty(config, *faults)}"
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {}),
        (2, {}),
        pytest.param(2, {"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"engine": "deepspeed", "zero_stage": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_stop_request_to_any_rank_saves_the_step_and_the_run_resumes_bit_by_bit(
    tmp_path: Path, tiny_data: Path, ranks: int, parallel: dict[str, Any]
) -> None:
    straight, stopped = (run_in(tmp_path / name, tiny_data, parallel=parallel) for name in ("straight", "stopped"))
    skipped = partial(poison, [3])  # a step without an update: the two counts differ from then on
    run_ranks(ranks, faulty, straight, skipped)
    number = signal.SIGTERM if ranks == 1 else signal.SIGUSR1
    stop = partial(at_step, 6, lambda _: os.kill(os.getpid(), number), rank=ranks - 1)
    assert run_ranks(ranks, faulty, stopped, skipped, stop) == [exit_codes.STOPPED] * ranks
    latest = store.find_latest(stopped.checkpoint_root)
    assert latest is not None
    assert latest.step == 6
    (end,) = events(stopped, "preempted")
    assert end["step"] == 6
    assert run_ranks(ranks, faulty, stopped, skipped) == [exit_codes.DONE] * ranks
    assert steps_of(stopped) == list(range(1, STEPS + 1))
    np.testing.assert_array_equal(losses(stopped), losses(straight))
    assert [event["batch"] for event in events(stopped, "skipped_step")] == [3]
    assert [event["event"] for event in events(stopped, "started", "resumed")] == ["started", "resumed"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_too_many_bad_steps_roll_the_run_back_and_their_batches_are_skipped(
    tmp_path: Path, tiny_data: Path, ranks: int
) -> None:
    data = {"train": [{"path": str(tiny_data / "train")}], "tokenizer": str(tiny_data / "tokens.model"),
            "num_workers": ranks - 1}  # fmt: skip
    config = run_in(tmp_path, tiny_data, data=data, faults={"max_skipped_steps": 2, "skip_margin": 1})
    run_ranks(
        ranks, faulty, config, partial(poison, [6, 7, 8], rank=ranks - 1), partial(keep_batches, tmp_path / "b")
    )
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


def test_a_crash_after_a_rollback_keeps_the_window_and_the_count(tmp_path: Path, tiny_data: Path) -> None:
    straight, crashed = (
        run_in(tmp_path / name, tiny_data, faults={"max_skipped_steps": 1, "max_rollbacks": 1})
        for name in ("straight", "crashed")
    )
    bad = partial(poison, [2, 3])
    run_ranks(1, faulty, straight, bad)

    def crash_after_rollback() -> None:
        at_step(1, lambda _: at_step(1, lambda _: os._exit(9)))  # the second time that step 1 begins

    with pytest.raises(AssertionError, match=r"died with \[9\]"):
        run_ranks(1, faulty, crashed, bad, crash_after_rollback)
    assert [event["to_step"] for event in events(crashed, "rollback")] == [0]  # there is no other checkpoint yet
    run_ranks(1, faulty, crashed, bad)
    assert len(events(crashed, "rollback")) == 1
    np.testing.assert_array_equal(losses(crashed), losses(straight))
    assert json.loads((crashed.run_dir / "skipped_batches.json").read_text()) == {
        "skipped_batches": [[1, 5]], "rollbacks": 1}  # fmt: skip


def crash_before_the_rewind() -> None:
    """With the newest checkpoint still of steps that are to be undone."""
    FaultDetector.in_streak = property(lambda _: False)  # type: ignore[method-assign, assignment]
    store.rewind = lambda _: os._exit(9)  # type: ignore[assignment]


def test_a_crash_in_the_middle_of_a_rollback_loses_nothing_and_skips_nothing_twice(
    tmp_path: Path, tiny_data: Path
) -> None:
    straight, crashed = (
        run_in(tmp_path / name, tiny_data, faults={"max_skipped_steps": 2, "skip_margin": 0})
        for name in ("straight", "crashed")
    )
    bad = partial(poison, [6, 7, 8])
    run_ranks(1, faulty, straight, bad)
    with pytest.raises(AssertionError, match=r"died with \[9\]"):
        run_ranks(1, faulty, crashed, bad, crash_before_the_rewind)
    assert [c.step for c in store.checkpoints(crashed.checkpoint_root)] == [4, 8]
    run_ranks(1, faulty, crashed, bad, partial(keep_batches, tmp_path / "b"))
    assert [event["step"] for event in events(crashed, "resumed")] == [4]
    assert batches(tmp_path / "b") == {step: step if step < 6 else step + 3 for step in range(4, STEPS)}
    np.testing.assert_array_equal(losses(crashed), losses(straight))
    assert json.loads((crashed.run_dir / "skipped_batches.json").read_text()) == {
        "skipped_batches": [[6, 9]], "rollbacks": 1}  # fmt: skip


def test_past_its_rollbacks_a_run_ends_and_names_batches_and_samples(tmp_path: Path, tiny_data: Path) -> None:
    config = run_in(tmp_path, tiny_data, faults={"max_skipped_steps": 0, "max_rollbacks": 1, "skip_margin": 0})
    with pytest.raises(AssertionError) as failed:
        run_ranks(2, faulty, config, partial(poison, range(5, 99)))
    message = str(failed.value)
    assert "steps 6 to 6 (batches 6 to 6): total, " in message
    assert "not finite in 1 step in a row; their first samples on this rank: thing-" in message
    assert "Rollbacks so far: 1, and faults.max_rollbacks is 1" in message


def test_no_checkpoint_is_made_in_a_streak_of_bad_steps_but_right_behind_it(tmp_path: Path, tiny_data: Path) -> None:
    config = run_in(tmp_path, tiny_data, checkpoint={"every": 4, "keep_last": 9})
    run_ranks(1, faulty, config, partial(poison, [3, 4]))
    assert [c.step for c in store.checkpoints(config.checkpoint_root)] == [0, 6, 8, 12]
    assert [event["step"] for event in events(config, "skipped_step")] == [4, 5]


@pytest.mark.parametrize(("action", "ranks"), [("warn", 1), ("rollback", 2)])
def test_a_loss_spike_is_logged_and_rolled_back_if_set(
    tmp_path: Path, tiny_data: Path, action: str, ranks: int
) -> None:
    """Of two ranks one alone sees it: what differs in the last bit may lie on both sides of the bound."""
    faults = {"spike_threshold": 50.0, "spike_steps": 2, "spike_action": action, "skip_margin": 0}
    config = run_in(tmp_path, tiny_data, train={**SHORT, "steps": 28}, checkpoint={"every": 12, "keep_last": 1},
                    faults=faults)  # fmt: skip

    def spike() -> None:
        def change(engine: Any, result: Any) -> Any:
            here = os.environ["RANK"] == "0" and 24 <= engine.progress().steps <= 25
            if here and read_events(config.run_dir)[-1]["event"] != "rollback":
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


@pytest.mark.parametrize("ranks", [1, 2])
def test_saves_that_fail_are_reported_and_end_the_run_past_their_budget(
    tmp_path: Path, tiny_data: Path, ranks: int
) -> None:
    config = run_in(tmp_path, tiny_data, checkpoint={"every": 2, "max_failures": 1})
    with pytest.raises(AssertionError, match=r"2 saves failed in a row, .*is 1; the last one: .*No space"):
        run_ranks(ranks, faulty, config, partial(failing_saves, [2, 6, 8]))
    assert [event["step"] for event in events(config, "saved")] == [0, 4]
    assert [event["step"] for event in events(config, "save_failed")] == [2, 6, 8]


@pytest.mark.parametrize("step", [0, STEPS])
def test_a_run_that_cannot_save_its_first_or_last_step_ends_with_an_error(
    tmp_path: Path, tiny_data: Path, step: int
) -> None:
    config = run_in(tmp_path, tiny_data)
    with pytest.raises(AssertionError, match=f"step {step} could not be saved: .*No space left"):
        run_ranks(1, faulty, config, partial(failing_saves, [step]))


def nothing_can_be_written(run_dir: Path) -> None:
    """Into the logs of a run: the disk is full."""
    run_dir.mkdir(parents=True)
    for name in ("events.jsonl", "metrics.jsonl", "routing_training.png.tmp"):
        (run_dir / name).symlink_to("/dev/full")
    (run_dir / "tensorboard").touch()  # where a folder must be


def test_logs_that_cannot_be_written_end_no_run(
    tmp_path: Path, tiny_data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = run_in(tmp_path, tiny_data, train={**SHORT, "heatmap_every": 2})
    nothing_can_be_written(config.run_dir)
    assert run_ranks(2, train, config) == [exit_codes.DONE] * 2
    assert [c.step for c in store.checkpoints(config.checkpoint_root)] == [8, 12]


def test_a_full_disk_ends_the_run_by_the_saves_that_fail(tmp_path: Path, tiny_data: Path) -> None:
    config = run_in(tmp_path, tiny_data, checkpoint={"every": 2, "max_failures": 1})
    nothing_can_be_written(config.run_dir)
    phases: list[str] = []

    def watched() -> None:
        beat, give_up = Watchdog.beat, CheckpointManager.give_up

        def note(watchdog: Watchdog, step: int, phase: str) -> None:
            phases.append(phase)
            beat(watchdog, step, phase)

        def note_failures(manager: CheckpointManager, failures: int) -> None:
            assert phases[-1] == "save", "it may wait for a save in flight, and longer than a step may take"
            give_up(manager, failures)

        Watchdog.beat, CheckpointManager.give_up = note, note_failures  # type: ignore[method-assign, assignment]

    with pytest.raises(AssertionError, match=r"ValueError: 2 saves failed in a row, .*No space left"):
        run_ranks(2, faulty, config, partial(failing_saves, [4, 6]), watched)


def damage(checkpoint: store.Checkpoint) -> None:
    path = Path(str(checkpoint)) / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_loaded(
    tmp_path: Path, tiny_data: Path, undisturbed: np.ndarray
) -> None:
    hurt = run_in(tmp_path, tiny_data)
    run_ranks(2, faulty, hurt, partial(at_step, 10, lambda _: os.kill(os.getpid(), signal.SIGTERM)))
    found = store.checkpoints(hurt.checkpoint_root)
    assert [c.step for c in found] == [8, 10]
    damage(found[-1])
    run_ranks(2, train, hurt)
    np.testing.assert_array_equal(losses(hurt), undisturbed)
    (event,) = events(hurt, "checkpoint_damaged")
    assert event["step"] == 10
    assert "rank_00000.safetensors" in event["error"]
    assert [event["step"] for event in events(hurt, "resumed")] == [8]


def test_a_run_never_begins_afresh_over_damaged_checkpoints(tmp_path: Path, tiny_data: Path) -> None:
    config = run_in(tmp_path, tiny_data)
    run_ranks(1, train, config)
    for checkpoint in store.checkpoints(config.checkpoint_root):
        damage(checkpoint)
    with pytest.raises(AssertionError, match=r"none of the 2 checkpoints in .* can be used: .*is damaged"):
        run_ranks(2, train, config)
    assert steps_of(config) == list(range(1, STEPS + 1))


def test_samples_are_counted_over_restarts_and_without_rolled_back_steps(tmp_path: Path, tiny_data: Path) -> None:
    rows = things(16)
    write_shards(tmp_path / "broken", rows, corrupt=(rows[3]["key"], rows[12]["key"]))
    data = {"train": [{"path": str(tmp_path / "broken")}], "tokenizer": str(tiny_data / "tokens.model"),
            "num_workers": 0, "max_bad_fraction": 0.5}  # fmt: skip
    train_section = {**SHORT, "global_batch_size": 16}  # each step reads all sixteen
    config = run_in(tmp_path, tiny_data, data=data, train=train_section, faults={"max_skipped_steps": 0})
    run_ranks(2, faulty, config, partial(poison, [5]), partial(at_step, 8, lambda _: os.kill(os.getpid(), 15)))
    meta = store.read_meta(store.checkpoints(config.checkpoint_root)[-1])
    assert meta["samples"] == {"read": 8 * 16, "bad": 16, "cut": {}}
    run_ranks(1, train, config)
    assert len(events(config, "rollback")) == 1
    assert [record["bad_samples"] for record in logged(config)] == [2 * step for step in range(1, STEPS + 1)]


def test_a_preempted_run_reaches_its_budget_of_bad_samples(tmp_path: Path, tiny_data: Path) -> None:
    rows = things(16)
    write_shards(tmp_path / "broken", rows, corrupt=(rows[3]["key"], rows[9]["key"], rows[12]["key"]))
    data = {"train": [{"path": str(tmp_path / "broken")}], "tokenizer": str(tiny_data / "tokens.model"),
            "num_workers": 0, "max_bad_fraction": 0.06}  # fmt: skip
    config = run_in(tmp_path, tiny_data, data=data, train={**SHORT, "steps": 99, "global_batch_size": 16})
    # 3 of 16 with 1 in 16 allowed are too many for sure after 8 steps or so; each start makes four.
    run_ranks(1, faulty, config, partial(at_step, 4, lambda _: os.kill(os.getpid(), 15)))
    run_ranks(1, faulty, config, partial(at_step, 8, lambda _: os.kill(os.getpid(), 15)))
    with pytest.raises(AssertionError, match=r"of (128|144|160|176|192) samples read were bad"):
        run_ranks(1, faulty, config, partial(at_step, 12, lambda _: os.kill(os.getpid(), 15)))


def test_after_a_rollback_the_clock_of_the_log_starts_again(tmp_path: Path, tiny_data: Path) -> None:
    config = run_in(tmp_path, tiny_data, train={**SHORT, "log_every": 4}, faults={"max_skipped_steps": 0})
    run_ranks(1, faulty, config, partial(poison, [5]))
    plain = run_in(tmp_path / "plain", tiny_data, train={**SHORT, "log_every": 4})
    run_ranks(1, train, plain)
    (more,), (tokens,) = ([r["tokens"] for r in logged(c) if r["step"] == 8] for c in (config, plain))
    assert more < 1.3 * tokens, "four steps, and not the two that were undone as well"


def test_a_data_worker_that_dies_is_journalled_and_costs_nothing(
    tmp_path: Path, tiny_data: Path, undisturbed: np.ndarray
) -> None:
    data = {"train": [{"path": str(tiny_data / "train")}], "tokenizer": str(tiny_data / "tokens.model"),
            "num_workers": 1}  # fmt: skip
    hurt = run_in(tmp_path, tiny_data, data=data)
    kill = partial(at_step, 3, lambda loader: os.kill(loader.worker_pids[0], signal.SIGKILL), rank=1)
    run_ranks(2, faulty, hurt, kill)
    assert [event["workers"] for event in events(hurt, "worker_restarted")] == [1]
    np.testing.assert_array_equal(losses(hurt), undisturbed)


def fail(_: Any) -> None:
    raise ValueError("this rank's disk is gone")


def endless_saves() -> None:
    """Rank 0 is slow to write every step but the first."""
    plain = saver.write_checkpoint

    def write(storage: Any, step: int, *args: Any) -> store.Checkpoint:
        if step and os.environ["RANK"] == "0":
            time.sleep(60)
        return plain(storage, step, *args)

    saver.write_checkpoint = write


@pytest.mark.parametrize("saves", [(), (endless_saves,)], ids=["", "while a save is in flight"])
def test_a_rank_that_fails_ends_the_others_and_nobody_waits(
    tmp_path: Path, tiny_data: Path, saves: tuple[Callable[[], None], ...]
) -> None:
    config = run_in(tmp_path, tiny_data, checkpoint={"every": 2})
    other, failed = run_ranks(2, outcome, config, *saves, partial(at_step, 3, fail, rank=1), timeout=45)
    assert failed == "ValueError: this rank's disk is gone"
    assert "closed" in other or "Connection" in other or "reset" in other, other


def test_a_rank_that_hangs_ends_the_run_before_its_collectives_do(tmp_path: Path, tiny_data: Path) -> None:
    config = run_in(tmp_path, tiny_data, faults={"hang_minutes": 0.05})
    spin = partial(at_step, 5, lambda _: time.sleep(80), rank=1)
    with pytest.raises(AssertionError, match=r"died with .*\b76\b"):
        run_ranks(2, faulty, config, spin, timeout=45)
    (message,) = (config.run_dir / "hangs").glob("*/message.txt")
    assert "The others wait for rank 1" in message.read_text(encoding="utf-8")


def test_a_loss_is_compared_without_its_weight_and_not_where_that_is_0(tmp_path: Path, tiny_data: Path) -> None:
    """The weighted loss rises from 0 with its weight: by it the first step would be the best."""
    schedule = objectives(captioning={"fraction": 1.0, "weight": [[1, 0.0], [4, 1.0]]})
    keep = {"every": 1, "keep_last": 1, "keep_best": 1, "best_metric": "captioning"}
    config = run_in(tmp_path, tiny_data, checkpoint=keep, objectives=schedule, train={**SHORT, "steps": 5})
    run_ranks(1, train, config)
    weighted = [record["losses"]["captioning"] for record in logged(config)]
    assert weighted == sorted(weighted) and weighted[:2] == [0, 0]
    best = min((3, 4, 5), key=lambda step: weighted[step - 1] * 3 / (step - 2))
    kept = {path.name for path in (config.run_dir / "checkpoints").glob("step_*")}
    assert kept == {f"step_{best:08}", "step_00000005"}


def test_a_metric_that_is_no_loss_is_refused_before_the_first_step(tmp_path: Path, tiny_data: Path) -> None:
    config = run_in(tmp_path, tiny_data, checkpoint={"every": 2, "keep_best": 1, "best_metric": "accuracy"})
    with pytest.raises(AssertionError, match="best_metric 'accuracy' is not a loss of this run: total, contrast"):
        run_ranks(1, train, config)
    assert events(config) == []
