"""``mmmoe status``: what it tells of folders that are written by hand."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain.train import status
from mmmoe_pretrain.train.lock import RunLock
from mmmoe_pretrain.train.status import last_lines, status_of
from mmmoe_pretrain.train.status_page import command, page


def write_run(folder: Path, events: list[Any], records: list[dict[str, Any]], tail: str = "") -> Path:
    """``events``: (seconds ago, kind, facts)."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("train: {steps: 1000, log_every: 10}\n")
    now = datetime.now(UTC)
    lines = [{"time": (now - timedelta(seconds=ago)).isoformat(timespec="milliseconds"), "event": kind, **facts}
             for ago, kind, facts in events]  # fmt: skip
    for name, values in (("events.jsonl", lines), ("metrics.jsonl", records)):
        text = "".join(json.dumps(value, separators=(",", ":")) + "\n" for value in values)
        (folder / name).write_text(text + tail)
    return folder


def record(step: int, seconds: float = 4.0, tokens: int = 800, **more: Any) -> dict[str, Any]:
    return {"step": step, "losses": {"total": 2.5, "aux/z": None}, "tokens": tokens, "tokens_total": 80 * step,
            "seconds": seconds, "data_seconds": 1.0, "bad_samples": 3, **more}  # fmt: skip


EVENTS = [
    (900, "started", {"step": 0}), (800, "saved", {"step": 0, "path": "x/step_00000000"}),
    (700, "resumed", {"step": 0}), (600, "skipped_step", {"step": 5}), (590, "skipped_step", {"step": 6}),
    (500, "rollback", {"step": 7}), (125, "saved", {"step": 90, "path": "x/step_00000090"}),
]  # fmt: skip
HALF = '{"step":120,"event":"sav'


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """The run's lock, by another process."""
    ready = multiprocessing.get_context("fork").Event()

    def hold() -> None:
        with RunLock(folder) as lock:
            lock.take(wait=0)
            ready.set()
            time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold, daemon=True)
    process.start()
    try:
        assert ready.wait(10)
        yield process.pid or 0
    finally:
        process.kill()
        process.join()


def test_a_running_run_tells_how_far_how_fast_and_when_it_ends(tmp_path: Path) -> None:
    """Records of 4, 5 and 60 s for 800 tokens in 10 steps: the median step takes 0.5 s, and 900 steps are left."""
    routing = [{"load_over_even": [0.0, 2.0]}, {"load_over_even": [1.0, 1.0]}]
    conflict = {"conflict/a-b": -0.5, "x": 1}  # which is not measured in every record
    records = [record(70, balance=conflict), record(80, 4.0, flops_per_second=3e9),
               record(90, 5.0, flops_per_second=2e9, mfu=0.5),
               record(100, 60.0, routing=routing, peak_memory={"a": 8}, flops_per_second=1e7, mfu=0.1,
                      planned={"speed_over_plan": 0.8}, balance={"ratio/scene/image": 1.25, "x": "?"})]  # fmt: skip
    folder = write_run(tmp_path / "runs" / "one", EVENTS, records, HALF)
    with held(folder) as pid:
        found = status_of(folder)
    assert (found.state, found.step, found.steps, found.tokens) == ("running", 100, 1000, 8000)
    assert found.holder == f"process {pid} on {socket.gethostname()}"
    assert (found.seconds_a_step, found.tokens_per_second) == (0.5, pytest.approx((200 + 160) / 2))
    assert (found.flops_per_second, found.mfu, found.speed_over_plan) == (2e9, 0.3, 0.8)
    assert found.seconds_left == pytest.approx(450, abs=5) and found.note == ""
    assert (found.losses, found.dead_experts, found.peak_memory) == ({"total": 2.5, "aux/z": None}, 1, 8)
    assert found.balance == {"conflict/a-b": -0.5, "x": None, "ratio/scene/image": 1.25}
    assert "\n  balance     conflict/a-b -0.5, x -, ratio/scene/image 1.25\n" in page(found)
    assert (found.checkpoint_step, found.checkpoint) == (90, "x/step_00000090")
    assert found.checkpoint_age == pytest.approx(125, abs=5)
    assert found.counts == {"restarts": 1, "rollbacks": 1, "skipped_steps": 2, "spikes": 0, "failed_saves": 0,
                            "worker_restarts": 0, "bad_samples": 3}  # fmt: skip
    assert [event["event"] for event in found.events] == [kind for _, kind, _ in EVENTS if kind != "saved"]
    with held(folder):  # nothing was unlocked
        pass


def test_a_run_that_writes_no_more_records_is_remarked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", EVENTS, [record(90), record(100)])
    os.utime(folder / "metrics.jsonl", (time.time() - 300,) * 2)
    with held(folder):
        assert status_of(folder).note == "no record for 5:00, where one takes 0:04"


@pytest.mark.parametrize("events, locked, state", [
    ([], False, "new"),
    ([], True, "starting"),
    ([(9, "started", {})], False, "failed"),
    ([(9, "started", {}), (8, "preempted", {}), (7, "saved", {})], False, "stopped"),
    ([(9, "started", {}), (8, "finished", {}), (7, "resumed", {})], False, "failed"),
    ([(9, "started", {}), (8, "preempted", {}), (7, "resumed", {}), (6, "finished", {})], False, "finished"),
])  # fmt: skip
def test_the_state_follows_from_the_lock_and_the_journal(
    tmp_path: Path, events: list[Any], locked: bool, state: str
) -> None:
    folder = write_run(tmp_path / "one", events, [])
    if locked:
        with held(folder):
            assert status_of(folder).state == state
    else:
        (folder / "lock").write_text("process 1 on elsewhere, started at 5\n")  # of one that was killed
        assert status_of(folder).state == state


@pytest.mark.parametrize("events, steps, step", [
    ([("started", 0), ("saved", 0), ("preempted", 1), ("saved", 1)], [], 1),  # stopped before the first record
    ([("started", 0), ("saved", 0), ("saved", 15)], [10], 15),
    ([("started", 0), ("saved", 10)], [10, 20], 20),
    ([("started", 0), ("saved", 15), ("rollback", 17), ("spike", 18)], [], 4),
    ([("started", 0), ("saved", 15), ("resumed", 9)], [], 9),  # the checkpoint of step 15 was damaged
    ([], [], 0),
])  # fmt: skip
def test_the_step_is_the_latest_of_records_and_journal(
    tmp_path: Path, events: list[Any], steps: list[int], step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    told = [(9, kind, {"step": at, "to_step": 4}) for kind, at in events]
    folder = write_run(tmp_path / "one", told, [record(each) for each in steps])
    assert status_of(folder).step == step
    command([folder], as_json=False)
    since = "last record 0:00 ago" if steps else "no record yet"
    assert f"  step        {step} of 1,000 ({step / 1000:.0%})" in (page := capsys.readouterr().out) and since in page


def test_the_message_of_a_hang_is_shown_until_the_run_starts_again(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", [(60, "started", {})], [])
    message = folder / "hangs" / "20260101T000000" / "message.txt"
    message.parent.mkdir(parents=True)
    message.write_text("The job hangs: no progress of rank 3\n")
    found = status_of(folder)
    assert (found.state, found.hang) == ("hung", "The job hangs: no progress of rank 3")
    os.utime(message, (time.time() - 3600,) * 2)
    assert (status_of(folder).state, status_of(folder).hang) == ("failed", "")


def test_what_is_no_run_is_an_error_alone_and_a_row_among_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = write_run(tmp_path / "one", [*EVENTS, (1, "finished", {"why": "\x1b[31m"})], [record(1000)])
    (tmp_path / "other").mkdir()
    for name, message in (("other", "is not the folder of a run: it has no config.yaml"), ("gone", "is not there")):
        with pytest.raises(ValueError, match=message):
            command([tmp_path / name], as_json=False)
    command([one, tmp_path / "other"], as_json=False)
    titles, first, second = capsys.readouterr().out.splitlines()
    assert titles.split()[:3] == ["run", "state", "step"]
    assert first.split()[:4] == ["one", "finished", "1,000/1,000", "200"] and second.split()[:3] == [
        "other",
        "no",
        "run",
    ]
    (one / "trackers").mkdir()
    (one / "trackers" / "mlflow.json").write_text('{"step": 990, "lost": 3, "failures": 2, "error": ""}')
    command([one], as_json=False)
    page = capsys.readouterr().out
    assert "mlflow: step 990, 3 lost, its process failed 2 times\n" in page
    assert "1,000 of 1,000 (100%), 80,000 tokens" in page and "?[31m" in page
    command([one], as_json=True)
    assert json.loads(capsys.readouterr().out)["checkpoint_step"] == 90


def test_damaged_files_hide_nothing_else(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", EVENTS, [record(100)])
    (folder / "config.yaml").write_text("train: {steps: [")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('not json\n{"step": "many"}\n[1]\n' + HALF)
    found = status_of(folder)
    assert (found.step, found.steps, found.checkpoint_step) == (100, None, 90)


def test_hostile_files_neither_hang_nor_end_it_and_json_stays_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that fake others, numbers that JSON does not have, depth, a pipe, a folder in place of a file, a line
    without end."""
    monkeypatch.setattr(status, "LONGEST_LINE", 4096)
    events = [(9, "started", {}), (8, "spike", {"why": "a\n  checkpoint  fake", "x": [math.nan, math.inf]})]
    folder = write_run(tmp_path / "one", events, [record(99, tokens=10**29, seconds=1e-320), record(100)])
    with (folder / "events.jsonl").open("a") as file:
        file.write(f'{{"event":"spike","x":{"[" * 900}{"]" * 900}}}\n{"x" * 9999}{{"event":"finished"}}\n')
    (folder / "trackers").mkdir()
    (folder / "trackers" / "wandb.json").write_text('{"step": NaN}')
    (folder / "hangs" / "a" / "message.txt").mkdir(parents=True)
    (folder / "hangs" / "b").mkdir()
    os.mkfifo(folder / "hangs" / "b" / "message.txt")
    command([folder], as_json=True)
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [event.get("x") for event in found["events"]][1] == [None, None] and found["counts"]["spikes"] == 2
    assert (found["trackers"], found["hang"]) == ({"wandb": {"step": None}}, "")
    command([folder], as_json=False)
    assert "spike: why a?  checkpoint  fake" in capsys.readouterr().out


def test_an_end_after_all_calendars_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "one", [(9, "started", {})], [record(90, 1e20), record(100, 1e20)])
    with held(folder):
        command([folder], as_json=False)
    assert "ends        in more than 100 years" in capsys.readouterr().out


def test_a_folder_that_may_not_be_read_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write_run(tmp_path / name, [], []) for name in ("one", "two")]

    def refused(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "config.yaml")

    monkeypatch.setattr(status, "_section", refused)  # as root, nothing is refused
    with pytest.raises(
        ValueError, match=r"one cannot be read: .*Permission denied: 'config.yaml'; run mmmoe status as"
    ):
        command(folders[:1], as_json=False)
    command(folders, as_json=True)
    assert all("cannot be read" in json.loads(line)["note"] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("text", ["", "a", "a\n", "a\nb", "a\nbb\nccc\n" * 9, "x" * 99 + "\n" + "y" * 40 + "\nz\n"])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_last_lines_of_a_file_are_read_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, block: int
) -> None:
    monkeypatch.setattr(status, "BLOCK", block)
    path = tmp_path / "lines"
    path.write_text(text)
    whole = [line.rstrip(b"\n") for line in text.encode().splitlines(keepends=True) if line.endswith(b"\n")]
    assert last_lines(path, 2) == whole[-2:]


def test_a_file_of_weeks_is_read_in_a_moment_and_without_torch(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", EVENTS, [record(100)])
    with (folder / "metrics.jsonl").open("wb") as file:
        file.truncate(1 << 34)  # a hole, which takes no room
        file.seek(0, 2)
        file.write(b"\n" + b"".join(json.dumps(record(step)).encode() + b"\n" for step in range(10, 500, 10)))
    code = "import sys; from mmmoe_pretrain.cli import app; app(standalone_mode=False); print('torch' in sys.modules)"
    began = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code, "status", str(folder)], capture_output=True, text=True,
                            timeout=20, check=True)  # fmt: skip
    assert time.monotonic() - began < 10
    assert "490 of 1,000 (49%)" in result.stdout and result.stdout.endswith("False\n")
