"""The record of a run's events outlives its crashes."""

import os
from contextlib import closing
from pathlib import Path

import pytest

from mmmoe_pretrain.train.journal import EVENTS, Journal, read_events


def test_events_of_all_starts_stand_in_order(tmp_path: Path) -> None:
    for step in (1, 2):
        with closing(Journal(tmp_path / "run")) as journal:
            journal.write("saved", step=step, path=f"step_{step}")
    events = read_events(tmp_path / "run")
    assert [(e["event"], e["step"], e["path"]) for e in events] == [("saved", 1, "step_1"), ("saved", 2, "step_2")]
    assert events[0]["time"] <= events[1]["time"]


def test_a_line_that_a_crash_tore_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_text('{"event":"started","step":0}\n{"event":"sav')
    with closing(Journal(tmp_path)) as journal:
        journal.write("resumed", step=5)
    assert [event["event"] for event in read_events(tmp_path)] == ["started", "resumed"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / "run", enabled=False)) as journal:
        journal.write("saved", step=1)
    assert not (tmp_path / "run").exists()
    assert read_events(tmp_path / "run") == []


def test_events_on_a_full_disk_are_lost_and_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / EVENTS).symlink_to("/dev/full")
    with closing(Journal(tmp_path)) as journal:
        for step in range(3):
            journal.write("saved", step=step)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "events.jsonl" in message
    assert "No space left" in message


def test_half_a_line_is_taken_back_when_the_disk_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, room = os.write, [80]

    def write(file: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = whole(file, data[: room[0]])
        room[0] -= written
        return written

    with closing(Journal(tmp_path)) as journal:
        monkeypatch.setattr(os, "write", write)
        journal.write("saved", step=1)
        journal.write("saved", step=2)
        room[0] = 1000
        journal.write("saved", step=3)
        monkeypatch.undo()
    assert len((tmp_path / EVENTS).read_text().splitlines()) == 2
    assert [event["step"] for event in read_events(tmp_path)] == [1, 3]
