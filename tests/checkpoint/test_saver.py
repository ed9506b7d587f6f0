"""Saving during training: the moment of the save, back-pressure, failures, retention, and who writes what."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain.checkpoint import save_plan, staging, store
from mmmoe_pretrain.checkpoint.folders import Retention
from mmmoe_pretrain.checkpoint.saver import Saver, SaveReport
from mmmoe_pretrain.checkpoint.staging import Staging
from mmmoe_pretrain.checkpoint.state import ShardedState, ShardedTensor
from mmmoe_pretrain.checkpoint.storage import LocalStorage, StorageError
from mmmoe_pretrain.parallel.runtime import process_group
from tests.checkpoint.support import assert_same, late_copies, small_state
from tests.distributed import run_ranks

KEEP = Retention(last=2, every=0, best=0)
RANKS = 2
META: dict[str, Any] = {"vocab_size": 48}
LOGICAL_BYTES = (3 * 48 + 3 * 48 + 5) * 4  # of small_state


def train(state: ShardedState) -> None:
    """Change every number in place, as a step does."""
    for tensor in state.values():
        for piece in tensor.pieces.values():
            piece.add_(1)


def saved_value(path: str | Path, value: float) -> None:
    """Assert that the checkpoint holds ``small_state`` of ``value``, bit for bit."""
    checkpoint = next(c for c in store.checkpoints(Path(path).parent) if c.name == Path(path).name)
    assert_same(store.load(checkpoint, small_state(), None), small_state(add=value))


@contextlib.contextmanager
def writing(change: Callable[[str], None]) -> Iterator[None]:
    """``change`` is called with the path before this process writes a file of tensors; what it raises is the
    disk's error."""
    original = LocalStorage.write

    def write(self: LocalStorage, path: str, chunks: Any) -> int:
        if path.endswith(".safetensors"):
            with self._explained("write", path):
                change(path)
        return original(self, path, chunks)

    LocalStorage.write = write  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalStorage.write = original  # type: ignore[method-assign]


def no_space(path: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


@contextlib.contextmanager
def ranks_group() -> Iterator[tuple[int, Any]]:
    with process_group(timeout_minutes=0.5):
        yield dist.get_rank(), dist.new_group(backend="gloo", timeout=timedelta(seconds=30))


def ended(saver: Saver) -> list[SaveReport]:
    saver.wait()
    return saver.poll()


def two_ranks(root: Path) -> dict[str, Any]:
    """Several cases in one process group: what this rank reports of each."""
    with ranks_group() as (rank, group):
        state = small_state(rank, RANKS, 1.0)
        return {
            "moment": the_moment(Saver(root / "moment", group, KEEP), state),
            "retention": retention(Saver(root / "retention", group, Retention(last=1, best=1)), state),
            "failure": failure(Saver(root / "failure", group, KEEP), rank),
            "copy": failures_of_the_copy(Saver(root / "copy", group, KEEP), rank),
            "layout": layout(Saver(root / "layout", group, KEEP), rank),
            "deletion": deletion(Saver(root / "deletion", group, KEEP, asynchronous=False), state),
        }


def the_moment(saver: Saver, state: ShardedState) -> list[SaveReport]:
    """A forward pass changes ``bias`` before anything else is copied, and training all else before a byte is
    written."""
    changed, meta = threading.Event(), {"progress": {"steps": 1}}
    state["model/bias"] = ShardedTensor(state["model/bias"].shape, state["model/bias"].pieces, steady=False)
    with late_copies(), writing(lambda path: None if changed.wait(20) else no_space(path)):
        saver.save(1, state, meta)
        train({"model/bias": state["model/bias"]})
        saver.wait_for_copy()
        train({key: tensor for key, tensor in state.items() if key != "model/bias"})
        meta["progress"]["steps"] = 2
        assert saver.poll() == []  # still in flight
        changed.set()
        return ended(saver)


def retention(saver: Saver, state: ShardedState) -> list[SaveReport]:
    for step in (2, 3, 4, 5):
        saver.save(step, state, META, metric=float(step))
    return ended(saver)


def failure(saver: Saver, rank: int) -> list[SaveReport]:
    """The disk of rank 1 is full at the second of three saves."""
    saver.save(1, small_state(rank, RANKS, 1.0), META)
    saver.wait()
    with writing(no_space) if rank == 1 else contextlib.nullcontext():
        saver.save(2, small_state(rank, RANKS, 2.0), META)
        saver.wait()
    saver.save(3, small_state(rank, RANKS, 3.0), META)  # the same layout in other memory, as after a rollback
    saver.close()
    return saver.poll()


def failures_of_the_copy(saver: Saver, rank: int) -> list[SaveReport]:
    """Of four saves, the thread of rank 1 cannot copy at the second, and at the third rank 0 changes a weight before
    it is copied."""

    def broken(pairs: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("CUDA error")

    for step in (1, 2, 3, 4):
        state = small_state(rank, RANKS, float(step))
        with contextlib.ExitStack() as faults:
            if (step, rank) == (2, 1):
                faults.enter_context(mock.patch.object(staging, "_copy", broken))
            if step == 3:
                faults.enter_context(late_copies())
            saver.save(step, state, META)
            if (step, rank) == (3, 0):
                train({"model/rows": state["model/rows"]})
            saver.wait_for_copy()
            train(state)
            saver.wait()
    return saver.poll()


def layout(saver: Saver, rank: int) -> list[SaveReport]:
    """At the second of three saves one rank lacks a piece that no other rank has."""
    saver.save(1, small_state(rank, RANKS, 1.0), META)
    state = small_state(rank, RANKS, 2.0)
    if rank == 1:
        state |= {key: ShardedTensor((8, 6), {}) for key in state if "/rows" in key}
    saver.save(2, state, META)
    saver.save(3, small_state(rank, RANKS, 3.0), META)
    return ended(saver)


def deletion(saver: Saver, state: ShardedState) -> tuple[float, float]:
    """When rank 0 had deleted, which takes it long, and when this rank's save was over."""
    deleted = [0.0]

    def slow(*args: object) -> None:
        time.sleep(0.5)
        deleted[0] = time.monotonic()

    with mock.patch.object(store, "prune", slow):
        saver.save(1, state, META)
    return deleted[0], time.monotonic()


Stories = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Stories:
    """What two ranks reported."""
    root = tmp_path_factory.mktemp("saver")
    return root, run_ranks(RANKS, two_ranks, root)


def reports_of(stories: Stories, story: str) -> list[list[SaveReport]]:
    return [rank[story] for rank in stories[1]]


def kept(root: Path) -> list[int]:
    return [checkpoint.step for checkpoint in store.checkpoints(root)]


def test_a_checkpoint_holds_the_state_of_the_moment_of_the_save(stories: Stories) -> None:
    for (report,) in reports_of(stories, "moment"):
        assert report.error is None and report.warning is None
        saved_value(report.path, 1.0)
    (checkpoint,) = store.checkpoints(stories[0] / "moment")
    assert store.read_meta(checkpoint) == {"progress": {"steps": 1}, "step": 1}


def test_what_every_rank_holds_is_written_by_one(stories: Stories) -> None:
    reports = reports_of(stories, "moment")
    assert sum(report.bytes for (report,) in reports) == LOGICAL_BYTES
    assert all(report.bytes >= 3 * 96 * 4 // RANKS for (report,) in reports)


def test_retention_follows_each_save(stories: Stories) -> None:
    assert kept(stories[0] / "retention") == [2, 5]  # the best by its metric and the last
    assert [(r.step, r.error, r.warning) for r in reports_of(stories, "retention")[0]] == [
        (step, None, None) for step in (2, 3, 4, 5)
    ]
    saved_value(stories[0] / "retention" / "step_00000005", 2.0)  # trained by a step since the first story


def test_if_one_rank_fails_no_rank_commits_and_every_rank_reports_why(stories: Stories) -> None:
    root = stories[0] / "failure"
    for reports in reports_of(stories, "failure"):
        assert [report.step for report in reports] == [1, 2, 3]
        assert [report.error is None for report in reports] == [True, False, True]
        failed = reports[1]
        assert [report.restartable for report in reports] == [False, True, False]
        assert failed.path == "" and "rank_00001.safetensors" in str(failed.error) and "full" in str(failed.error)
    assert kept(root) == [1, 3]
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000001", "step_00000003"]
    saved_value(root / "step_00000001", 1.0)
    saved_value(root / "step_00000003", 3.0)


def test_a_copy_that_fails_or_may_be_of_two_steps_fails_the_save_on_every_rank(stories: Stories) -> None:
    root = stories[0] / "copy"
    for _, broken, mixed, last in reports_of(stories, "copy"):
        assert "rank 1: RuntimeError: CUDA error" in str(broken.error) and broken.restartable
        assert "model/rows changed before the update of the step" in str(mixed.error) and not mixed.restartable
        assert mixed.path == "" and last.error is None
    assert kept(root) == [1, 4]
    saved_value(root / "step_00000001", 1.0)
    saved_value(root / "step_00000004", 4.0)


def test_seconds_that_an_update_waits_for_the_copy_count_as_blocked(tmp_path: Path) -> None:
    saver, run = Saver(tmp_path, None, KEEP), staging.Copying.run

    def slow(copying: staging.Copying) -> list[torch.Tensor]:
        time.sleep(0.3)
        return run(copying)

    with mock.patch.object(staging.Copying, "run", slow):
        saver.save(1, small_state(add=1.0), META)
        saver.wait_for_copy()
        saver.wait_for_copy()  # it is over
    (report,) = ended(saver)
    assert 0.2 < report.seconds_before_update <= report.seconds_blocked
    assert report.seconds_waited < 0.1


def test_a_layout_that_changes_on_one_rank_is_planned_anew_on_all(stories: Stories) -> None:
    for reports in reports_of(stories, "layout"):
        errors = [report.error for report in reports]
        assert errors[0] is None and errors[2] is None
        assert "of model/rows" in str(errors[1])
        assert not reports[1].restartable  # the next start would hold the same pieces
    assert kept(stories[0] / "layout") == [1, 3]
    saved_value(stories[0] / "layout" / "step_00000003", 3.0)


def test_a_save_waits_for_the_one_before_and_says_how_long(tmp_path: Path) -> None:
    saver, state, at_once = Saver(tmp_path, None, KEEP), small_state(add=1.0), threading.Lock()

    def slow(path: str) -> None:
        assert at_once.acquire(blocking=False), "two saves in flight"
        time.sleep(0.3)
        at_once.release()

    with writing(slow):
        saver.save(1, state, META)
        saver.save(2, state, META)
        first, second = ended(saver)
    assert first.seconds_waited < 0.1 and first.seconds_writing >= 0.3
    assert 0.2 < second.seconds_waited <= second.seconds_blocked
    assert kept(tmp_path) == [1, 2]


def test_a_synchronous_save_is_there_when_it_returns_and_drafts_of_a_killed_run_are_not(tmp_path: Path) -> None:
    draft = tmp_path / "step_00000007.tmp"
    draft.mkdir()
    (draft / "rank_00000.safetensors").write_bytes(b"half")
    saver = Saver(tmp_path, None, KEEP, asynchronous=False)
    saver.save(1, small_state(add=1.0), META, metric=0.5)
    (report,) = saver.poll()
    assert report.seconds_blocked >= report.seconds_writing > 0 and not draft.exists()
    saved_value(report.path, 1.0)
    assert store.read_meta(store.checkpoints(tmp_path)[0])["metric"] == 0.5


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_unexpected_error_of_the_thread_is_raised_by_the_next_call(tmp_path: Path) -> None:
    saver = Saver(tmp_path, None, KEEP)

    def broken(path: str) -> None:
        raise KeyError("a mistake in the program")

    with writing(broken):
        saver.save(1, small_state(add=1.0), META)
        with pytest.raises(KeyError, match="a mistake"):
            saver.wait()
    saver.save(2, small_state(add=2.0), META)
    assert [report.step for report in ended(saver)] == [2]


def test_host_memory_is_allocated_once_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Counted(Staging):
        def __init__(self, tensors: Any) -> None:
            made.append(len(tensors))
            super().__init__(tensors)

    monkeypatch.setattr("mmmoe_pretrain.checkpoint.saver.Staging", Counted)
    saver = Saver(tmp_path, None, KEEP)
    saver.prepare(small_state(add=1.0))
    assert made == [7]
    for step in (1, 2):
        saver.save(step, small_state(add=float(step)), META)
    larger = small_state(add=3.0)
    larger["model/more"] = ShardedTensor((2,), {(0,): torch.ones(2)})
    saver.save(3, larger, META)
    assert made == [7, 8]
    saver.close()
    assert [report.error for report in saver.poll()] == [None] * 3


def peer_leaves(root: Path) -> list[SaveReport]:
    """Rank 1 ends with its thread in the middle of a save."""
    entered = threading.Event()

    def endless(*args: object) -> None:
        entered.set()
        threading.Event().wait()

    with ranks_group() as (rank, group):
        saver = Saver(root, group, KEEP)
        if rank == 0:
            saver.save(1, small_state(rank, RANKS, 1.0), META)
            return ended(saver)
        with mock.patch("mmmoe_pretrain.checkpoint.saver.write_checkpoint", endless):
            saver.save(1, small_state(rank, RANKS, 1.0), META)
            entered.wait()
            return []


def test_a_rank_that_dies_during_a_save_is_reported_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    (report,), _ = run_ranks(RANKS, peer_leaves, tmp_path)
    assert report.error is not None and report.path == "" and report.restartable
    assert time.monotonic() - began < 15  # the group's timeout is 30 s
    assert store.checkpoints(tmp_path) == []


def test_no_rank_trains_on_from_a_synchronous_save_while_rank_0_deletes(stories: Stories) -> None:
    (deleted, _), (_, over) = (rank["deletion"] for rank in stories[1])
    assert over > deleted > 0


def test_a_save_that_latest_does_not_name_has_failed_and_the_next_makes_it_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save_plan, "RETRY", 0.0)
    saver, replace = Saver(tmp_path, None, KEEP, asynchronous=False), LocalStorage.replace
    failures = {1: 0, 2: 1, 3: 2, 4: 0}  # of the attempts at replacing ``latest``, by step
    for step, left in failures.items():

        def failing(self: LocalStorage, path: str, data: bytes, left: list[int] = [left]) -> None:  # noqa: B006
            left[0] -= 1
            if left[0] >= 0:
                raise StorageError("injected")
            replace(self, path, data)

        monkeypatch.setattr(LocalStorage, "replace", failing)
        saver.save(step, small_state(add=float(step)), META)
        (report,) = saver.poll()
        newest = store.find_latest(tmp_path)
        if step != 3:
            assert report.error is None and newest is not None and newest.step == step
            continue
        assert "step_00000003 is written, but latest may still name the one before" in str(report.error)
        assert report.restartable and report.path == ""
        assert newest is not None and newest.step == 2
        assert kept(tmp_path) == [1, 2, 3] and [c.step for c in store.candidates(tmp_path)] == [1, 2]
    assert [c.step for c in store.candidates(tmp_path)] == [3, 4]
    saved_value(tmp_path / "step_00000003", 3.0)


STUCK = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from mmmoe_pretrain.checkpoint.folders import Retention
from mmmoe_pretrain.checkpoint.saver import Saver
from mmmoe_pretrain.checkpoint.state import ShardedTensor

folder, peer = Path(sys.argv[1]), os.fork()
rank = 0 if peer else 1
store = dist.FileStore(str(folder / "store"), 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
group = dist.new_group(backend="gloo", timeout=timedelta(hours=2))
saver = Saver(folder / "checkpoints", group, Retention(last=1, every=0, best=0))
state = {"model/w": ShardedTensor((2,), {(0,): torch.ones(2)})}
saver.prepare(state)
if rank == 1:
    os.dup2(2, 1)  # who reads the other's output does not wait for this one
    time.sleep(60)  # alive, and never there
    os._exit(0)
dist.all_reduce = lambda *args, **kwargs: None  # its peer is not asked whether it has the same layout
saver.save(1, state, {})
assert saver.poll() == []
print("in flight", peer, flush=True)
raise SystemExit(3)
"""


def test_a_thread_that_waits_for_a_peer_does_not_delay_the_exit(tmp_path: Path) -> None:
    command = [sys.executable, "-c", STUCK, str(tmp_path)]
    found = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, timeout=60)
    output = found.stdout.split()
    os.kill(int(output[-1]), signal.SIGKILL)
    assert found.returncode == 3 and output[:2] == ["in", "flight"]
