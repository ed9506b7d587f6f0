"""Trackers: they get the numbers of metrics.jsonl, each step once, and no failure of theirs reaches the run.

The tests put a library of our own in the place of MLflow, on PYTHONPATH, where the process of a tracker finds it;
``test_real_trackers.py`` has the real ones.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.watching import TrackersConfig
from mmmoe_pretrain.train.loop import train
from mmmoe_pretrain.train.trackers import feed, kinds, relay
from mmmoe_pretrain.train.trackers.kinds import (
    KINDS,
    Kind,
    Line,
    Wandb,
    check_installed,
)
from tests.distributed import run_ranks
from tests.support import things, write_shards
from tests.train.faulty import at_step, codes, config_in, faulty, logged, signalled

MLFLOW = '''
import json, os, pathlib
HERE = pathlib.Path(__file__).parents[1]

class MlflowClient:
    """Of a server that is gone while there is a file called down."""
    def __init__(self, tracking_uri): pass
    def _call(self, **value):
        if (HERE / "down").exists():
            raise ConnectionError("no route to host")
        with (HERE / "calls").open("a") as file:
            file.write(json.dumps(value) + chr(10))
    def get_experiment_by_name(self, name): return None
    def create_experiment(self, name): return "1"
    def create_run(self, experiment, run_name):
        self._call(created=run_name)
        class run:
            class info:
                run_id = "the run"
        return run
    def update_run(self, run_id, status): self._call(id=run_id, status=status)
    def set_terminated(self, run_id, status): self._call(id=run_id, status=status)
    def log_batch(self, run_id, metrics=(), params=()):
        self._call(id=run_id, metrics=metrics, params=[p[0] for p in params])
'''
ENTITIES = (
    "def Metric(name, value, at, step): return [name, value, step]\ndef Param(key, value): return [key, value]\n"
)


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an mlflow."""
    folder = tmp_path / "libraries"
    for name, text in {"mlflow/__init__": MLFLOW, "mlflow/entities": ENTITIES}.items():
        (folder / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder


def calls(libraries: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (libraries / "calls").read_text().splitlines()]


def totals(libraries: Path) -> list[tuple[int, float]]:
    """(step, total loss) as the tracker got them."""
    return [(step, value) for call in calls(libraries) for name, value, step in call.get("metrics", ())
            if name == "1_loss/total"]  # fmt: skip


def records(config: RunConfig) -> list[tuple[int, float]]:
    return [(record["step"], record["losses"]["total"]) for record in logged(config)]


def test_every_tracker_of_a_config_has_a_class() -> None:
    assert set(KINDS) == set(TrackersConfig.model_fields)


def test_a_server_that_is_gone_for_a_while_costs_neither_a_step_nor_a_record(
    tmp_path: Path, tiny_data: Path, libraries: Path
) -> None:
    train = {"steps": 6}
    config = config_in(tmp_path, tiny_data, train=train, trackers={"mlflow": {"uri": "http://127.0.0.1:1"}})
    (libraries / "down").touch()
    run_ranks(1, faulty, config, partial(at_step, 5, lambda _: (libraries / "down").unlink()))
    assert totals(libraries) == records(config) and len(records(config)) == 6
    first, *others, last = calls(libraries)
    assert first == {"created": "tiny"} and any("train.steps" in call["params"] for call in others)
    assert last == {"id": "the run", "status": "FINISHED"}


def test_a_restarted_run_goes_on_in_the_trackers_run_and_repeats_no_step(
    tmp_path: Path, tiny_data: Path, libraries: Path
) -> None:
    """At least steps 5 and 6, after the checkpoint of step 4, are trained twice."""
    train = {"steps": 8}
    config = config_in(tmp_path, tiny_data, train=train, trackers={"mlflow": {"uri": "http://127.0.0.1:1"}})
    killed = partial(at_step, 7, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    assert codes(1, config, killed) == [-signal.SIGKILL]
    assert codes(1, config) == [0]
    assert totals(libraries) == records(config) and len(records(config)) == 8
    assert [call for call in calls(libraries) if "created" in call or "status" in call] == [
        {"created": "tiny"},
        {"id": "the run", "status": "KILLED"},
        {"id": "the run", "status": "RUNNING"},
        {"id": "the run", "status": "FINISHED"},
    ]


def test_a_tracker_gets_the_scores_that_a_stop_put_off_with_the_record_of_their_step(
    tmp_path: Path, tiny_data: Path, libraries: Path
) -> None:
    write_shards(tmp_path / "validation", things(72)[48:])
    evaluation = {"validation": str(tmp_path / "validation"), "every": 2}
    config = config_in(tmp_path, tiny_data, train={"steps": 4}, evaluate=evaluation,
                       trackers={"mlflow": {"uri": "http://127.0.0.1:1"}})  # fmt: skip
    assert codes(1, config, partial(signalled, 2)) == [exit_codes.STOPPED]
    assert totals(libraries) == records(config)[:1]
    assert codes(1, config) == [0]
    assert totals(libraries) == records(config) and len(records(config)) == 4
    held_out = [(step, value) for call in calls(libraries) for name, value, step in call.get("metrics", ())
                if name == "0_held_out/total"]  # fmt: skip
    assert held_out == [(r["step"], r["held_out"]["losses"]["total"]) for r in logged(config) if "held_out" in r]
    assert [step for step, _ in held_out] == [2, 4]


def test_a_tracker_that_is_not_installed_is_one_error_before_anything_is_trained(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "not_a_library").mkdir()  # as the folder of files called wandb
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(kinds.KINDS, "wandb", Kind(Wandb, "not_a_library", "wandb", "trackers"))
    monkeypatch.setitem(kinds.KINDS, "mlflow", Kind(Wandb, "no_such_library", "mlflow-skinny", "trackers"))
    with pytest.raises(
        ValueError, match=r"trackers.wandb, trackers.mlflow: .*'mmmoe\[trackers\]', or wandb mlflow-skinny"
    ):
        check_installed(["wandb", "mlflow"])
    config = config_in(tmp_path, tiny_data, trackers={"wandb": {}})
    with pytest.raises(AssertionError, match=r"trackers.wandb: not installed .*, or wandb alone, or leave it out"):
        run_ranks(2, train, config)
    assert not config.run_dir.exists()


def test_the_extra_of_a_tracker_has_its_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    for kind in kinds.KINDS.values():
        names = [re.split("[<>=]", wanted)[0] for wanted in project["optional-dependencies"][kind.extra]]
        assert kind.package in names


@pytest.mark.parametrize("trackers, message", [
    ({"wandb": {"mode": "of"}}, r"trackers.wandb.mode: .*'online' or 'offline'"),
    ({"mlflow": {}}, "trackers.mlflow.uri: required"),
    ({"mlflow": {"uri": "http://me:secret@host"}}, "holds a secret"),
    ({"comet": {}}, "unknown key 'trackers.comet'"),
])  # fmt: skip
def test_bad_settings_are_refused(trackers: dict[str, Any], message: str) -> None:
    values = {"name": "x", "data": {"train": "x"}, "modalities": {"text": {"kind": "text"}},
              "objectives": {"pages": {"kind": "next_token", "parts": ["text"]}}}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        run_config.parse({**values, "trackers": trackers})


def test_a_process_that_takes_nothing_never_holds_up_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(feed, "STOPPED_SECONDS", 0.2)
    feeds = feed.Feeds(["trackio"], tmp_path)
    os.kill(feeds._feeds[0]._process.pid, signal.SIGSTOP)
    began = time.monotonic()
    for step in range(200):
        feeds.write(step, [(f"value_{i}", i / 7) for i in range(400)])
    assert time.monotonic() - began < 2.0
    feeds.close(finished=False)
    assert feeds._feeds[0]._process.poll() == -signal.SIGKILL
    assert sum("takes no records" in message for message in caplog.messages) == 1
    assert "199 records did not reach it" in caplog.text, "all but step 0, which is none"


def test_a_process_that_ends_or_cannot_start_is_started_again_and_what_is_lost_is_counted(
    tmp_path: Path, libraries: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 1 arrives, and its process is killed; the one of step 2 cannot start, the one of step 3 can."""
    monkeypatch.setattr(feed, "PAUSE", 0.0)
    (tmp_path / "config.yaml").write_text("{name: x, trackers: {mlflow: {uri: 'http://127.0.0.1:9', experiment: a}}}")
    path, spawn = tmp_path / "trackers" / "mlflow.json", subprocess.Popen

    def reaches(step: int) -> None:
        deadline = time.monotonic() + 20
        while relay.read_state(path).step < step:
            assert time.monotonic() < deadline, "nothing arrives"
            time.sleep(0.01)

    def cannot(*_: Any, **__: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    feeds = feed.Feeds(["mlflow"], tmp_path)
    feeds.write(1, [("1_loss/total", 1.0)])
    reaches(1)
    process = feeds._feeds[0]._process
    assert process is not None
    process.kill()
    process.wait()
    monkeypatch.setattr(subprocess, "Popen", cannot)
    feeds.write(2, [("1_loss/total", 2.0)])
    monkeypatch.setattr(subprocess, "Popen", spawn)
    feeds.write(3, [("1_loss/total", 3.0)])
    reaches(3)
    feeds.close(finished=True)
    assert totals(libraries) == [(1, 1.0), (3, 3.0)]
    assert [call for call in calls(libraries) if "created" in call or "status" in call] == [
        {"created": "x"}, {"id": "the run", "status": "RUNNING"}, {"id": "the run", "status": "FINISHED"},
    ]  # fmt: skip
    state = relay.read_state(path)
    assert (state.sent, state.lost, state.failures) == (2, 1, 2)
    assert "its process ended with code -9" in caplog.text and "cannot start: [Errno 11]" in caplog.text


class Failing:
    """Raises at the second line, twice, and keeps the rest."""

    id = "the id"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.failures = 2

    def log(self, line: Line) -> None:
        if line.step == 20 and self.failures:
            self.failures -= 1
            raise RuntimeError("no room\nat all")
        self.steps.append(line.step)

    def close(self, finished: bool) -> None:
        self.steps.append(-1)


def test_a_failed_line_is_sent_again_in_order_and_what_is_left_at_the_end_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(relay, "PAUSE", 0.02)
    monkeypatch.setattr(relay, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(signal, "setitimer", lambda *_: None)  # which would end this process
    path = tmp_path / "x.json"

    def served(tracker: Failing, steps: list[int]) -> relay.State:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        thread = threading.Thread(target=relay.Relay("x", lambda _: tracker, relay.Inbox(theirs), path).run)
        thread.start()
        for step in steps:
            ours.send(json.dumps({"step": step, "time": 0.0, "values": {"a": 1.0}}).encode())
        ours.close()
        thread.join(10)
        assert not thread.is_alive()
        theirs.close()
        return relay.read_state(path)

    tracker = Failing()
    state = served(tracker, [10, 20, 30, 20, 30, 40])  # a rollback to 10
    assert tracker.steps == [10, 20, 30, 40, -1]
    assert state == relay.State("the id", step=40, sent=4, lost=0, error="")
    broken = Failing()
    broken.failures = 10**9
    path.unlink()
    state = served(broken, [10, 20, 30])
    assert (broken.steps, state.step, state.lost) == ([10, -1], 10, 2)
    assert state.error == "RuntimeError: no room at all"
    assert sum("RuntimeError" in message for message in caplog.messages) == 2  # once for each
    assert "2 records are lost" in caplog.text


@pytest.mark.parametrize("taken, message", [
    ("trackers", "trackers.mlflow cannot start: "), ("trackers/mlflow.json/a", "cannot write "),
])  # fmt: skip
def test_files_that_cannot_be_written_are_one_line_of_a_tracker(
    tmp_path: Path,
    libraries: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    taken: str,
    message: str,
) -> None:
    monkeypatch.setattr(feed, "STOPPED_SECONDS", 0.5)
    (tmp_path / "config.yaml").write_text("{name: x, trackers: {mlflow: {uri: 'http://127.0.0.1:9', experiment: a}}}")
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).write_text("")
    feeds = feed.Feeds(["mlflow"], tmp_path)
    feeds.write(1, [("a", 1.0)])
    told, deadline = "", time.monotonic() + 40
    while message not in told and time.monotonic() < deadline:
        time.sleep(0.05)
        told += capfd.readouterr().err
    feeds.close(finished=False)
    told += capfd.readouterr().err
    assert "Traceback" not in told and told.count(message) == 1
