"""Trackers: they get the numbers of metrics.jsonl, each step once, and no failure of theirs reaches the run.

Fast tests put a library of our own in the place of MLflow, on PYTHONPATH, where the process of a tracker finds it.
Others need the real ones, and are skipped without them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.watching import TrackersConfig
from mmmoe_pretrain.train.loop import train
from mmmoe_pretrain.train.trackers import feed, kinds, relay
from mmmoe_pretrain.train.trackers.kinds import KINDS, Kind, Line, Wandb, check_installed, is_installed
from tests.distributed import free_port, run_ranks
from tests.train.faulty import at_step, codes, config_in, faulty, logged

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


def test_a_tracker_that_is_not_installed_is_one_error_before_anything_is_trained(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "not_a_library").mkdir()  # as the folder of files called wandb
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(kinds.KINDS, "wandb", Kind(Wandb, "not_a_library", "wandb"))
    monkeypatch.setitem(kinds.KINDS, "mlflow", Kind(Wandb, "no_such_library", "mlflow-skinny"))
    with pytest.raises(ValueError, match=r"trackers.wandb, trackers.mlflow: .* pip install wandb mlflow-skinny, or"):
        check_installed(["wandb", "mlflow"])
    config = config_in(tmp_path, tiny_data, trackers={"wandb": {}})
    with pytest.raises(AssertionError, match=r"trackers.wandb: not installed .*; pip install wandb, or leave it out"):
        run_ranks(2, train, config)
    assert not config.run_dir.exists()


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
        feeds.write(step, {f"value_{i}": i / 7 for i in range(400)})
    assert time.monotonic() - began < 2.0
    feeds.close(finished=False)
    lost = feeds._feeds[0].lost
    assert 0 < lost < 200
    assert feeds._feeds[0]._process.poll() == -signal.SIGKILL
    assert sum("takes no records" in message for message in caplog.messages) == 1
    assert f"{lost} records did not reach it" in caplog.text


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


def wandb_history(folder: Path) -> dict[int, dict[str, float]]:
    """The values by step in the file of an offline run: records of wandb's protocol in LevelDB's log format, blocks
    of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, record, found = path.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            parsed = wandb_internal_pb2.Record.FromString(record)
            if parsed.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): item.value_json for item in parsed.history.item}
                found[parsed.history.step.num] = {k: json.loads(v) for k, v in items.items() if not k.startswith("_")}
            record = b""
    return found


def of_mlflow(uri: str, run_id: str) -> dict[int, dict[str, float]]:
    from mlflow import MlflowClient

    client, found = MlflowClient(tracking_uri=uri), {}
    for name in client.get_run(run_id).data.metrics:
        for metric in client.get_metric_history(run_id, name):
            assert name not in found.setdefault(metric.step, {}), "a step twice"
            found[metric.step][name] = metric.value
    return found


def of_trackio(folder: Path, name: str) -> dict[int, dict[str, float]]:
    import trackio.utils
    from trackio import sqlite_storage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trackio.utils, "TRACKIO_DIR", folder)
        patch.setattr(sqlite_storage, "TRACKIO_DIR", folder)
        rows = sqlite_storage.SQLiteStorage.get_logs("mmmoe", name)
    return {row.pop("step"): {k: v for k, v in row.items() if k != "timestamp"} for row in rows}


def expected(config: RunConfig) -> dict[int, dict[str, float]]:
    """What metrics.jsonl has of the values whose place there needs no computing."""
    return {
        record["step"]: {
            **{f"1_loss/{k}": v for k, v in record["losses"].items() if not k.startswith("aux/")},
            **{f"4_auxiliary_loss/{k[4:]}": v for k, v in record["losses"].items() if k.startswith("aux/")},
            "3_optimizer/grad_norm": record["grad_norm"],
            "3_optimizer/learning_rate": record["learning_rate"],
            "5_speed/tokens_per_second": record["tokens_per_second"],
            "5_speed/data_wait_fraction": record["data_stall"],
        }
        for record in logged(config)
    }


def test_the_real_trackers_hold_the_numbers_of_the_log(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are installed."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for what reads it here
    mlruns, rows = tmp_path / "mlruns", tmp_path / "trackio"
    places: dict[str, dict[str, str]] = {
        "wandb": {"mode": "offline"}, "mlflow": {"uri": str(mlruns)}, "trackio": {"folder": str(rows)},
    }  # fmt: skip
    readers: dict[str, Callable[[str], dict[int, dict[str, float]]]] = {
        "wandb": lambda _: wandb_history(folder),
        "mlflow": lambda run_id: of_mlflow(str(mlruns), run_id),
        "trackio": lambda run_id: of_trackio(rows, f"tiny-{run_id}"),
    }
    installed = [name for name in places if is_installed(KINDS[name].module)]
    if not installed:
        pytest.skip("no tracker is installed")
    config = config_in(tmp_path, tiny_data, trackers={name: places[name] for name in installed})
    run_ranks(1, train, config)
    folder, want = config.run_dir / "trackers", expected(config)
    for name in installed:
        held = readers[name](relay.read_state(folder / f"{name}.json").id)
        assert {step: {key: values[key] for key in want[step]} for step, values in held.items()} == want, name


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--default-artifact-root", str(folder)],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                assert time.monotonic() < deadline and server.poll() is None, "the server does not start"
                time.sleep(0.2)
        yield server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
def test_an_mlflow_server_that_is_killed_in_the_middle_ends_no_training(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in ("mlflow.server", "sqlalchemy", "alembic"):
        pytest.importorskip(library)
    monkeypatch.setattr(feed, "KILL_SECONDS", 15.0)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    with mlflow_server(tmp_path, port) as server:
        config = config_in(tmp_path, tiny_data, train={"steps": 60}, trackers={"mlflow": {"uri": uri}})
        state = config.run_dir / "trackers" / "mlflow.json"

        def kill(_: object) -> None:
            deadline = time.monotonic() + 30
            while relay.read_state(state).sent < 5:
                assert time.monotonic() < deadline, "nothing arrives"
                time.sleep(0.1)
            os.killpg(server.pid, signal.SIGKILL)

        run_ranks(1, faulty, config, partial(at_step, 30, kill))
        assert len(records(config)) == 60
        ended = relay.read_state(state)
        assert ended.sent >= 5 and ended.lost == 60 - ended.sent > 0 and ended.error
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    held, want = of_mlflow(uri, ended.id), expected(config)
    assert held and all({k: held[step][k] for k in want[step]} == want[step] for step in list(held)[:-1])


@pytest.mark.parametrize("taken, message", [
    ("trackers", "trackers.mlflow cannot start: "), ("trackers/mlflow.json/a", "cannot write "),
])  # fmt: skip
def test_files_that_cannot_be_written_are_one_line_of_a_tracker(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, taken: str, message: str
) -> None:
    monkeypatch.setattr(feed, "STOPPED_SECONDS", 2.5)
    (tmp_path / "config.yaml").write_text("{name: x, trackers: {mlflow: {uri: 'http://127.0.0.1:9', experiment: a}}}")
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).write_text("")
    feeds = feed.Feeds(["mlflow"], tmp_path)
    feeds.write(1, {"a": 1.0})
    feeds.close(finished=False)
    told = capfd.readouterr().err
    assert "Traceback" not in told and told.count(message) == 1
