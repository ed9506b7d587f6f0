"""Long operations report rate and time left on stderr, short ones do not."""

from __future__ import annotations

import time

import pytest

from mmmoe_pretrain import progress
from mmmoe_pretrain.data.sources.rows import read_rows
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.progress import Progress, track
from tests.support import write_tar


@pytest.fixture
def clock(monkeypatch):
    """The seconds that ``time.monotonic`` tells there; set ``clock[0]``."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_rate_and_the_time_left_follow_from_what_is_done(clock):
    work = Progress("sharding", 100_000, "samples")
    clock[0] += 8
    assert work.text() == "sharding: 0:08 so far"
    work.advance(3200)
    assert work.text() == "sharding: 3,200 of 100,000 samples, 400 a second, 4:02 left"  # 96,800 / 400 = 242 s
    work.restart(50_000, 100_000)  # half of it was done before
    clock[0] += 1
    work.advance(5)
    assert work.text() == "sharding: 50,005 of 100,000 samples, 5 a second, 2:46:39 left"  # 49,995 / 5 = 9,999 s
    file = Progress("a.tar", 161_000_000, "MB", scale=10**6)
    clock[0] += 2
    file.advance(11_000_000)
    assert file.text() == "a.tar: 11 of 161 MB, 5.5 a second, 0:27 left"  # 150 / 5.5 = 27.3 s


def test_what_is_waited_for_is_told_after_five_seconds(clock):
    work = Progress("sharding", 100, "samples", waits_for="downloads")
    clock[0] += 4
    assert work.text() == "sharding: 0:04 so far"
    clock[0] += 4
    assert work.text() == "sharding: 0:08 so far; for 0:08 waiting for downloads"
    work.advance(8)
    assert work.text() == "sharding: 8 of 100 samples, 1 a second, 1:32 left"
    clock[0] += 8
    assert work.text() == "sharding: 8 of 100 samples, 0.5 a second, 3:04 left; for 0:08 waiting for downloads"


def test_lines_come_after_two_seconds_on_stderr_alone(monkeypatch, capsys):
    assert (progress.QUIET_SECONDS, progress.LINE_SECONDS) == (2, 10)
    assert list(track(range(3), "quick", 3, "items")) == [0, 1, 2]
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    for _ in track(range(2), "slow", 2, "items"):
        time.sleep(0.06)
    out, err = capsys.readouterr()
    assert out == "" and "quick" not in err
    assert "slow: 1 of 2 items, " in err and err.count("\n") >= 3


def test_the_first_rank_tells_how_far_the_indexing_of_shards_is(monkeypatch, capsys, tmp_path):
    def slow(url, settings):
        time.sleep(0.06)
        return read_rows(url, settings)

    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", [("a.txt", b"")])
    monkeypatch.setattr("mmmoe_pretrain.data.sources.indexing.read_rows", slow)
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.01)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        (tmp_path / "shards.index").unlink(missing_ok=True)
        open_indexed(tmp_path)
        message = f"indexing {tmp_path}: 1 of 2 shards, " in capsys.readouterr().err
        assert message == (rank == "0")


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("slow", 2, "items") as work:
        work.advance()
        time.sleep(0.3)
    out, err = capsys.readouterr()
    assert out == "" and "slow: 1 of 2 items" in err


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (200, "3:20"), (3725, "1:02:05"), (59.7, "1:00")])
def test_durations(seconds: float, text: str) -> None:
    assert progress.clock(seconds) == text
