"""The libraries of the trackers, which ``make test`` installs: they hold the numbers of metrics.jsonl."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.train.trackers import relay
from mmmoe_pretrain.train.trackers.kinds import KINDS, Line, Mlflow, Subject, is_installed
from tests.distributed import free_port, run_ranks
from tests.train.faulty import at_step, config_in, faulty, logged


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


def of_mlflow_server(database: Path, run_id: str) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    with closing(sqlite3.connect(database)) as tables:
        for name, value, step in tables.execute("select key, value, step from metrics where run_uuid = ?", (run_id,)):
            assert name not in found.setdefault(step, {}), "a step twice"
            found[step][name] = value
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


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """MLflow's own application and database under Flask's server: ``mlflow server`` needs pandas and more."""
    server = subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "mlflow.server:app", "run", "--port", str(port)],
        env={**os.environ, "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
             "_MLFLOW_SERVER_ARTIFACT_ROOT": str(folder)},
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
                time.sleep(0.1)
        yield server
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 40
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def of_installed(places: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Those whose library is there, which are all of them after ``make test``."""
    found = {name: place for name, place in places.items() if is_installed(KINDS[name].module)}
    if not found:
        pytest.skip("no tracker is installed; make test installs all")
    return found


def test_the_real_trackers_hold_the_numbers_of_the_log_though_a_server_is_killed_in_the_middle(
    tmp_path: Path, tiny_data: Path
) -> None:
    """W&B offline and trackio in folders, and an MLflow server that is killed before step 10 and starts again before
    step 20."""
    for library in ("mlflow", "flask", "sqlalchemy", "alembic"):
        pytest.importorskip(library)
    rows, pid_file, port = tmp_path / "trackio", tmp_path / "server.pid", free_port()
    uri = f"http://127.0.0.1:{port}"
    places = of_installed({"wandb": {"mode": "offline"}, "mlflow": {"uri": uri}, "trackio": {"folder": str(rows)}})
    config = config_in(tmp_path, tiny_data, train={"steps": 24}, trackers=places)
    folder = config.run_dir / "trackers"
    with ExitStack() as servers:
        server = servers.enter_context(mlflow_server(tmp_path, port))

        def state() -> relay.State:
            return relay.read_state(folder / "mlflow.json")

        def kill(_: object) -> None:
            until(lambda: state().sent >= 5, "nothing arrives")
            os.killpg(server.pid, signal.SIGKILL)

        def start_again(_: object) -> None:
            until(lambda: bool(state().error), "the tracker sees no failure")
            again = servers.enter_context(mlflow_server(tmp_path, port))
            pid_file.write_text(str(again.pid))  # this is a fork, which ends without its context managers
            until(lambda: state().sent >= 18, "nothing arrives at the new server")

        try:
            run_ranks(1, faulty, config, partial(at_step, 10, kill), partial(at_step, 20, start_again))
        finally:
            if pid_file.exists():
                os.killpg(int(pid_file.read_text()), signal.SIGKILL)
    want = expected(config)
    assert list(want) == list(range(1, 25))
    readers: dict[str, Callable[[str], dict[int, dict[str, float]]]] = {
        "wandb": lambda _: wandb_history(folder),
        "mlflow": lambda run_id: of_mlflow_server(tmp_path / "mlflow.db", run_id),
        "trackio": lambda run_id: of_trackio(rows, f"tiny-{run_id}"),
    }
    for name in places:
        its = relay.read_state(folder / f"{name}.json")
        held = readers[name](its.id)
        assert {step: {key: values[key] for key in want[step]} for step, values in held.items()} == want, name
        assert (its.step, its.sent, its.lost, its.error) == (24, 24, 0, ""), name


def test_a_folder_of_mlflow_holds_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    settings = {"uri": str(tmp_path / "mlruns"), "experiment": "mmmoe"}
    tracker = Mlflow(Subject("x", tmp_path, settings, {"train": {"steps": 2}}, "", "new"))
    tracker.log(Line(1, 0.0, {"a": 0.5, "b": 2.0}))
    tracker.log(Line(2, 1.0, {"a": 0.25}))
    tracker.close(finished=True)
    assert of_mlflow(settings["uri"], tracker.id) == {1: {"a": 0.5, "b": 2.0}, 2: {"a": 0.25}}
