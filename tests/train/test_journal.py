"""The record of a run's events outlives its crashes."""

from pathlib import Path

from mmmoe_pretrain.train.journal import EVENTS, Journal, read_events


def test_events_of_all_starts_stand_in_order(tmp_path: Path) -> None:
    for step in (1, 2):
        with Journal(tmp_path / "run") as journal:
            journal.write("saved", step=step, path=f"step_{step}")
    events = read_events(tmp_path / "run")
    assert [(e["event"], e["step"], e["path"]) for e in events] == [("saved", 1, "step_1"), ("saved", 2, "step_2")]
    assert events[0]["time"] <= events[1]["time"]


def test_a_line_that_a_crash_tore_costs_no_other(tmp_path: Path) -> None:
    (tmp_path / EVENTS).write_text('{"event":"started","step":0}\n{"event":"sav')
    with Journal(tmp_path) as journal:
        journal.write("resumed", step=5)
    assert [event["event"] for event in read_events(tmp_path)] == ["started", "resumed"]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path / "run", enabled=False) as journal:
        journal.write("saved", step=1)
    assert not (tmp_path / "run").exists()
    assert read_events(tmp_path / "run") == []
