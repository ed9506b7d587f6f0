"""How a run starts: never from step 0 if its checkpoints are missing, never while another job trains it, and never
partly replaced."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.checkpoint.storage import LocalStorage
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.train import lock, loop, opening, reporting, start
from mmmoe_pretrain.train.lock import RunLock
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.support import VECTORS, objectives, things, tiny_config, write_shards, write_tokenizer
from tests.train.faulty import (
    STEPS,
    at_step,
    codes,
    config_in,
    copied,
    events,
    faulty,
    killed_in_save,
    outcome,
    saved,
    steps_of,
)

ALL = list(range(1, STEPS + 1))


def cut_short(folder: Path) -> None:
    path = folder / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_a_run_whose_checkpoints_are_lost_does_not_start_from_step_0_unless_told_to(
    tmp_path: Path, undisturbed: RunConfig
) -> None:
    def lose_manifests(folder: Path) -> None:
        for path in folder.glob("step_*/manifest.json"):
            path.unlink()

    def cut_short(folder: Path) -> None:
        for path in folder.glob("step_*/rank_00000.safetensors"):
            path.write_bytes(path.read_bytes()[:-1])

    lost = {
        cut_short: "none of the checkpoints .* is complete: step_00000006, step_00000008, step_00000012",
        lose_manifests: "none of the checkpoints .* is complete",
        shutil.rmtree: r"events.jsonl records a save of step 12, and there is no checkpoint in",
    }
    for number, (lose, message) in enumerate(lost.items()):
        config = copied(undisturbed, tmp_path / str(number))
        lose(config.run_dir / "checkpoints")  # type: ignore[operator]
        with pytest.raises(AssertionError, match=f"ValueError: .*{message}.*--overwrite"):
            run_ranks(1, train, config)
        assert steps_of(config) == ALL
    run_ranks(1, train, config, False, True)
    assert [event["step"] for event in events(config, "started")] == [0]


@pytest.mark.parametrize("url", ["", "file://"])
def test_what_was_never_committed_is_no_loss(tmp_path: Path, url: str) -> None:
    config = tiny_config(tmp_path, checkpoint={"folder": f"{url}{tmp_path / 'checkpoints'}"})
    (tmp_path / "checkpoints" / "tiny" / "step_00000000.tmp").mkdir(parents=True)
    assert start._look(config, resume=False, overwrite=False) == start.Start()


def test_at_a_url_only_the_manifest_commits() -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe("/start/step_00000000/rank_00000.safetensors", b"begun")
    assert start._committed("memory://start") == []
    files.pipe("/start/step_00000000/manifest.json", b"{}")
    assert [c.step for c in start._committed("memory://start")] == [0]


@pytest.mark.parametrize("step", [0, STEPS])
def test_a_rank_killed_in_a_save_that_the_run_waits_for_asks_for_a_new_start(
    tmp_path: Path, tiny_data: Path, step: int
) -> None:
    config = config_in(tmp_path, tiny_data)
    fault = partial(killed_in_save, step, rank=1)
    assert codes(2, config, fault) == [exit_codes.FAULT, -signal.SIGKILL]
    assert codes(2, config) == [0, 0]
    assert steps_of(config) == ALL


def killed_after(deletions: int) -> None:
    plain, left = LocalStorage.remove_folder, [deletions]

    def remove(storage: LocalStorage, name: str) -> None:
        if not left[0]:
            os._exit(9)
        left[0] -= 1
        plain(storage, name)

    LocalStorage.remove_folder = remove  # type: ignore[method-assign]


def as_start(number: int, job: str) -> None:
    os.environ.update(TORCHELASTIC_RUN_ID=job, TORCHELASTIC_RESTART_COUNT=str(number))


@pytest.mark.parametrize("job", ["first", "second"])
def test_a_run_killed_while_it_replaces_an_older_one_replaces_it_in_the_next_start(
    tmp_path: Path, tiny_data: Path, undisturbed: RunConfig, job: str
) -> None:
    """Also one that an earlier job of the same name has replaced."""
    config = copied(undisturbed, tmp_path)
    (config.run_dir / "replaced_by").write_text("first")
    with pytest.raises(AssertionError, match=r"died with \[9\]"):
        run_ranks(1, partial(faulty, overwrite=True), config, partial(as_start, 0, job), partial(killed_after, 1))
    assert saved(config) == [0, 6, 8], "the newest goes first"
    shorter = config_in(tmp_path, tiny_data, train={"steps": 2})
    run_ranks(1, partial(faulty, overwrite=True), shorter, partial(as_start, 1, job))  # the same job, started again
    assert [event["event"] for event in events(shorter, "started", "resumed")] == ["started"]


def test_half_a_replaced_folder_is_still_known_as_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tmp_path)
    config.run_dir.mkdir(parents=True)
    for name in ("config.yaml", "events.jsonl", "skipped_batches.json"):
        (config.run_dir / name).touch()
    deleted: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: deleted.append(path.name))
    start._clear(config)
    assert deleted[-1] == "config.yaml"
    assert {"events.jsonl", "skipped_batches.json"} < set(deleted)


def test_data_that_no_objective_can_use_is_refused_on_every_rank(tmp_path: Path, tiny_data: Path) -> None:
    source = write_shards(tmp_path / "silent", things(16), lacking=("text",))
    config = config_in(tmp_path, tiny_data, data={"train": [{"path": str(source)}]},
                       objectives=objectives({"pairs": {"image-text": 1.0}}, None))  # fmt: skip
    for message in run_ranks(2, outcome, config):
        assert message.startswith("ValueError: no sample of data.train serves an objective"), message
        assert "contrastive image-text needs image and text. The 16 samples hold: image+audio 16" in message
    assert not config.run_dir.exists()


PLACES = {"build_modalities": loop, "Loader": opening, "survey": opening, "MetricsLog": reporting}


@pytest.mark.parametrize("place", PLACES)
def test_what_fails_on_one_rank_alone_is_told_by_all(tmp_path: Path, tiny_data: Path, place: str) -> None:
    """E.g. a file that is missing on one machine."""

    def missing(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no such file on this machine")

    def fails(rank: int) -> None:
        if int(os.environ["RANK"]) == rank:
            setattr(PLACES[place], place, missing)

    rank = 0 if place in ("survey", "MetricsLog") else 1  # only rank 0 counts the samples and has a log
    for message in run_ranks(2, outcome, config_in(tmp_path, tiny_data), partial(fails, rank)):
        assert message == "ValueError: no such file on this machine"


def stays(path: Path, loader: Any) -> None:
    path.touch()
    time.sleep(60)


def test_a_second_job_on_a_run_is_refused_on_every_rank_and_harms_nothing(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path, tiny_data, data={"num_workers": 1}, train={"steps": 6}, checkpoint={"every": 2})
    monkeypatch.setattr(lock.RunLock.take, "__defaults__", (0.3,))
    first = multiprocessing.get_context("fork").Process(
        target=run_ranks, args=(1, faulty, config, partial(at_step, 3, partial(stays, tmp_path / "there")))
    )
    first.start()
    try:
        deadline = time.monotonic() + 60
        latest = config.run_dir / "checkpoints" / "latest"  # written by a thread, while the next step begins
        while time.monotonic() < deadline and not (
            (tmp_path / "there").exists() and latest.exists() and "step_00000002" in latest.read_text()
        ):
            time.sleep(0.05)
        before = sorted(config.run_dir.rglob("*"))
        for message in run_ranks(2, outcome, config):
            assert message.startswith("Restartable")  # exit code 1: it passes
            assert f"{config.run_dir} is being trained by process " in message
        with pytest.raises(AssertionError, match="is being trained by"):
            run_ranks(1, train, config, False, True)
        assert sorted(config.run_dir.rglob("*")) == before
    finally:
        for pid in _children(first.pid):
            os.kill(pid, signal.SIGKILL)
        first.join(20)
        first.kill()
    monkeypatch.undo()
    run_ranks(1, train, config)
    assert [event["step"] for event in events(config, "resumed")] == [2]


def _children(pid: int | None) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_lock_ends_with_its_process_though_a_child_of_it_cannot_die(tmp_path: Path) -> None:
    reader, writer = os.pipe()

    def hold() -> None:
        held = RunLock(tmp_path)
        held.take()
        child = os.fork()
        if child:
            os.write(writer, f"{child}\n".encode())
        signal.pause()

    process = multiprocessing.get_context("fork").Process(target=hold, daemon=True)
    process.start()
    child = int(os.read(reader, 99))
    os.kill(child, signal.SIGSTOP)
    try:
        with pytest.raises(
            exit_codes.Restartable, match=rf"being trained by process {process.pid} on .*another name="
        ):
            RunLock(tmp_path).take(0.2)
        process.kill()
        process.join()
        with RunLock(tmp_path) as held:
            assert not held.take(0.2)
            assert not held.take(), "it has it already"
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("holder", "taken", "warned"),
    [
        ("process {parent} on {host}, started at {began}", False, False),
        ("process {parent} on {host}, started at 1", True, False),  # its number is another's now
        ("process {ended} on {host}, started at 1", True, False),
        ("process {parent} on elsewhere, started at {began}", True, True),
        ("", True, True),
    ],
)
def test_without_locks_the_holder_is_known_by_host_process_and_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, holder: str, taken: bool,
    warned: bool,
) -> None:  # fmt: skip
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    facts = {
        "parent": os.getppid(),
        "host": socket.gethostname(),
        "began": lock._start(os.getppid()),
        "ended": ended.pid,
    }
    (tmp_path / "lock").write_text(holder.format(**facts))
    if not taken:
        with pytest.raises(exit_codes.Restartable, match="is being trained by process"):
            RunLock(tmp_path).take(0.2)
        return
    with RunLock(tmp_path) as held:
        assert not held.take(0.2)
        assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    assert ("no locks" in caplog.text) == warned


def test_a_folder_that_cannot_be_written_is_one_error_on_every_rank(tmp_path: Path, tiny_data: Path) -> None:
    config = config_in(tmp_path, tiny_data)
    Path(config.runs_dir).write_text("no folder")
    for message in run_ranks(2, outcome, config):
        assert message.startswith(f"ValueError: the run's folder {config.run_dir} cannot be written: ")


def test_a_folder_that_another_machine_does_not_see_is_refused_on_every_rank(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines that each have a folder of this name: here by another working directory."""
    monkeypatch.setattr(start, "SHARED_WITHIN", 0.3)
    monkeypatch.setattr(socket, "gethostname", lambda: f"host{os.environ.get('RANK')}")

    def machine(apart: bool) -> None:
        place = tmp_path / (os.environ["RANK"] if apart else "0")
        (place / "runs" / "tiny").mkdir(parents=True, exist_ok=True)
        os.environ["LOCAL_RANK"] = "0"
        os.chdir(place)

    config = config_in(tmp_path, tiny_data, train={"steps": 1}).model_copy(update={"runs_dir": "runs"})
    for message in run_ranks(2, outcome, config, partial(machine, True)):
        assert re.match(
            r"ValueError: the run's folder \S+/[01]/runs/tiny on host1 is not the one of rank 0; ", message
        )
    assert run_ranks(2, outcome, config, partial(machine, False)) == ["code 0"] * 2


def test_a_machine_with_another_config_is_refused_on_every_rank(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights would drift from the others'. Paths may differ: each machine may have the data at its own place."""
    monkeypatch.setattr(socket, "gethostname", lambda: f"host{os.environ.get('RANK')}")
    copy = shutil.copytree(tiny_data, tmp_path / "copy")
    same = config_in(tmp_path, tiny_data, train={"steps": 1})
    source = same.data.train[0].model_copy(update={"path": str(copy / "train")})

    def rank(second: RunConfig) -> str:
        return outcome(second if os.environ["RANK"] == "1" else same)

    for message in run_ranks(2, rank, same.model_copy(update={"seed": 9})):
        assert message.startswith("ValueError: rank 1 on host1 has another seed than rank 0 on host0; start every ")
    assert not same.run_dir.exists()
    other = tmp_path / "other.npz"
    content = dict(np.load(VECTORS))
    np.savez(other, **{**content, "vectors": -content["vectors"]})
    anchors = {"kind": "semantic_anchors", "of": "image", "text": "text", "size": 8}
    same, others, copied = (
        config_in(tmp_path, tiny_data, train={"steps": 1}, objectives={"anchors": {**anchors, "vectors": str(path)}})
        for path in (VECTORS, other, shutil.copy(VECTORS, tmp_path / "copy.npz"))
    )
    for message in run_ranks(2, rank, others):
        assert message.startswith(
            "ValueError: rank 1 on host1 has another objectives.anchors.fingerprint than rank 0 "
        )
    elsewhere = same.data.model_copy(update={"train": (source,)})
    assert run_ranks(2, rank, copied.model_copy(update={"data": elsewhere})) == ["code 0"] * 2


def test_the_config_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokens.model")
    config, done = tiny_config(tmp_path), []
    config.run_dir.mkdir(parents=True)
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), sync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append(str(new)), rename(old, new)))
    start.write_config(config, xxhash.xxh3_128_hexdigest(tokenizer.read_bytes()))
    names = ("tokenizer.model.tmp", "tokenizer.model", "config.yaml.tmp", "config.yaml")
    assert done == [str(config.run_dir / name) for name in names]


def test_overwrite_replaces_checkpoints_that_lie_elsewhere(tmp_path: Path, tiny_data: Path) -> None:
    elsewhere = {"every": 4, "folder": f"file://{tmp_path / 'elsewhere'}"}
    long, short = (config_in(tmp_path, tiny_data, checkpoint=elsewhere, train={"steps": steps}) for steps in (6, 2))
    run_ranks(1, train, long)
    assert saved(long) == [4, 6]
    run_ranks(1, train, short, False, True)
    assert saved(long) == [0, 2]
    assert not (long.run_dir / "checkpoints").exists()
    (long.run_dir / "config.yaml").unlink()  # a new machine, whose disk is empty
    other = {**long.model.model_dump(), "num_heads": 1}
    with pytest.raises(AssertionError, match="cannot change the model"):
        run_ranks(1, train, config_in(tmp_path, tiny_data, checkpoint=elsewhere, model=other))
    run_ranks(1, train, long)
    assert [event["step"] for event in events(long, "resumed")] == [2]
