"""The process that forks data workers: it has no threads and no device of the rank, and ends with it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mmmoe_pretrain.data.workers.server import Prepare, WorkerServer
from mmmoe_pretrain.exit_codes import Restartable
from tests.data.test_workers import is_running

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def server() -> Iterator[WorkerServer]:
    with WorkerServer() as server:
        yield server


def opened(offset: int) -> Prepare:
    """Workers that tell what they see, and then do what they are told."""

    def prepare(given: dict[str, Any]) -> Callable[[list[int]], None]:
        return partial(main, given, os.getpid())

    def main(given: dict[str, Any], prepared: int, descriptors: list[int]) -> None:
        seen = {
            "prepared by": prepared,
            "sum": offset + given.get("number", 0),
            "length": len(given.get("text", "")),
            "parent": os.getppid(),
            "threads of the parent": len(os.listdir(f"/proc/{os.getppid()}/task")),
            "cuda": torch.cuda.is_initialized(),
        }
        os.write(descriptors[0], json.dumps(seen).encode())
        time.sleep(given.get("sleep", 0))
        os._exit(given.get("exit", 0))

    return prepare


def broken() -> Prepare:
    raise ValueError("no shards here")


def answer_of(server: WorkerServer, **given: Any) -> dict[str, Any]:
    told, tells = os.pipe()
    process = server.fork(given, [tells])
    os.close(tells)
    with os.fdopen(told) as answer:
        return {**json.loads(answer.read()), "process": process}


def test_workers_are_forked_without_the_threads_and_the_device_of_the_rank(
    server: WorkerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "_initialized", True)  # as it is once the rank uses a GPU
    server.open(opened, 40)
    for number in range(2):  # the second after the first has ended, as in the place of a lost one
        seen = answer_of(server, number=number, text="x" * 3_000_000)
        assert (seen["sum"], seen["length"]) == (40 + number, 3_000_000)
        assert (seen["parent"], seen["threads of the parent"], seen["cuda"]) == (server.pid, 1, False)
        assert seen["prepared by"] == server.pid
        assert server.pid != os.getpid() and torch.cuda.is_initialized()


def test_exit_codes_and_signals_are_told(server: WorkerServer) -> None:
    server.open(opened, 0)
    ended = answer_of(server, exit=3)["process"]
    ended.join(10)
    assert ended.exitcode == 3
    ended.kill()  # it is not there: nothing happens
    told, tells = os.pipe()
    killed = server.fork({"sleep": 99}, [tells])
    os.read(told, 1)
    killed.join(0.05)
    assert killed.exitcode is None and is_running(killed.pid)
    killed.kill()
    killed.join(10)
    assert killed.exitcode == -signal.SIGKILL and not is_running(killed.pid)
    os.close(told)
    os.close(tells)


def test_what_fails_at_the_opening_is_told_at_the_first_worker(server: WorkerServer) -> None:
    with pytest.raises(RuntimeError, match="could not start one: it has opened nothing"):
        server.fork({}, [0])
    server.open(broken)
    with pytest.raises(RuntimeError, match=r"(?s)could not start one: .*ValueError: no shards here"):
        server.fork({}, [0])
    server.open(opened, 1)
    assert answer_of(server)["sum"] == 1


def test_a_server_that_was_killed_ends_the_run_restartably(server: WorkerServer) -> None:
    server.open(opened, 0)
    told, tells = os.pipe()
    worker = server.fork({"sleep": 99}, [tells])
    os.read(told, 1)
    assert server.pid
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(Restartable, match=r"has ended .*memory ran out as a rule: lower data.num_workers"):
        server.fork({}, [tells])
    assert worker.exitcode is None
    os.kill(worker.pid, signal.SIGKILL)  # ``run_worker`` ends by itself
    os.close(told)
    os.close(tells)


@pytest.mark.parametrize("length", [0, 3_000_000], ids=["no answer", "the request is not read"])
def test_a_server_that_is_stopped_ends_the_run_restartably_within_the_given_time(
    server: WorkerServer, length: int
) -> None:
    server.open(opened, 0)
    assert answer_of(server)["sum"] == 0
    assert server.pid
    os.kill(server.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(Restartable, match=rf"\(process {server.pid}\) did not answer for 0.5 s: .*Start the run"):
        server.fork({"text": "x" * length}, [0], seconds=0.5)
    assert 0.5 <= time.monotonic() - began < 10
    assert not is_running(server.pid)


def test_the_server_ends_with_its_rank_however_that_ends(tmp_path: Path) -> None:
    def rank(end: Callable[[], object]) -> None:
        server = WorkerServer()
        (tmp_path / str(server.pid)).touch()
        end()

    ends = (lambda: None, lambda: os._exit(4), lambda: os.kill(os.getpid(), signal.SIGKILL))
    ranks = [multiprocessing.get_context("fork").Process(target=rank, args=(end,)) for end in ends]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(30)
    assert [process.exitcode for process in ranks] == [0, 4, -signal.SIGKILL]
    pids = [int(path.name) for path in tmp_path.iterdir()]
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)
    assert len(pids) == 3
