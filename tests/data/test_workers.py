"""Workers that are killed, stopped, wrong or abandoned: the items stay the same, and no process is left."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from mmmoe_pretrain.data.loader import Loader, MicrobatchDataset
from mmmoe_pretrain.data.workers import ReadAhead, WorkerDied, Workers
from tests.data.test_loader import assert_same, batches, built, config_with

pytestmark = pytest.mark.timeout(60)
LARGE = 300_000  # bytes of an item: more than a pipe holds, so that a worker mostly stands inside a message


@dataclass(frozen=True)
class Blocks:
    """Item k is LARGE bytes drawn from seed k; ``fault(k)`` runs before, in the worker."""

    fault: Callable[[int], object] = lambda k: None

    def read(self, k: int) -> bytes:
        self.fault(k)
        return np.random.default_rng(k).bytes(LARGE)

    def describe(self, k: int) -> str:
        return f"block {k}"


def plain(numbers: range) -> list[bytes]:
    return [Blocks().read(k) for k in numbers]


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@pytest.mark.parametrize("count, prefetch", [(0, 1), (1, 1), (1, 5), (3, 2), (7, 1)])
def test_items_come_in_order_and_the_workers_end_with_the_last(count: int, prefetch: int) -> None:
    items = ReadAhead(Blocks(), range(3, 15, 2), Workers(count, prefetch))
    first = next(items)
    pids = items.pids
    assert len(pids) == count
    assert [first, *items] == plain(range(3, 15, 2))
    assert not any(is_running(pid) for pid in pids)
    assert items.restarts == 0


def test_no_more_than_prefetch_items_are_made_ahead(tmp_path: Path) -> None:
    items = ReadAhead(Blocks(lambda k: (tmp_path / str(k)).touch()), range(100), Workers(2, prefetch=3))
    next(items)
    while len(list(tmp_path.iterdir())) < 7:  # the one delivered, and three of each worker
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) == 7
    items.close()


@pytest.mark.parametrize("seed", range(2))
def test_killing_workers_at_any_moment_changes_no_item(seed: int) -> None:
    chance = random.Random(seed)
    items = ReadAhead(Blocks(), range(60), Workers(3, 2, max_restarts=99))
    got = []
    for _ in range(60):
        got.append(next(items))
        if chance.random() < 0.3:
            time.sleep(chance.choice([0, 0.001, 0.01]))
            os.kill(chance.choice(items.pids), signal.SIGKILL)
    assert got == plain(range(60))
    assert items.restarts > 3  # of about 18 kills; one that was dead already is not counted again


def test_a_loader_whose_workers_are_killed_reads_the_same_batches(
    tiny_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_with(tiny_data, {"num_workers": 2}, faults={"max_worker_restarts": 50})
    modalities = built(config)
    expected = batches(Loader(config_with(tiny_data), modalities, stop_step=12))
    chance, steps = random.Random(1), []
    with caplog.at_level(logging.WARNING), Loader(config, modalities, stop_step=12) as loader:
        for data in loader:
            steps.append(data)
            if data.step < 10:
                os.kill(chance.choice(loader.worker_pids), signal.SIGKILL)
                time.sleep(chance.random() * 0.03)
    assert_same(batches(steps), expected)
    restarts = sum(data.stats.worker_restarts for data in steps)
    assert restarts >= 3  # of ten kills; a worker that is dead already dies no second time
    assert sum("a data worker died (SIGKILL)" in message for message in caplog.messages) == restarts


class _Deadly(MicrobatchDataset):
    def __getitem__(self, number: int) -> Any:
        if number == 3:
            faulthandler.disable()  # pytest's: it would report this one
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__getitem__(number)


def test_samples_that_kill_every_worker_end_the_run_and_are_named(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with(tiny_data, {"num_workers": 2}, faults={"max_worker_restarts": 2})
    modalities = built(config)
    expected = list(Loader(config_with(tiny_data), modalities, stop_step=2))[1].microbatches[1]
    monkeypatch.setattr("mmmoe_pretrain.data.loader.MicrobatchDataset", _Deadly)
    loader = Loader(config, modalities, stop_step=9)
    with pytest.raises(
        WorkerDied, match=r"died \(SIGSEGV\) at batch 1, samples thing-.*; 3 died on this rank"
    ) as error:
        list(loader)  # whether or not what was read before had been taken
    assert all(meta.key in str(error.value) for meta in expected.metas)
    assert loader.worker_pids == []


def test_without_restarts_the_first_death_ends_the_run() -> None:
    items = ReadAhead(Blocks(lambda k: os._exit(3) if k == 4 else None), range(9), Workers(2, 1, max_restarts=0))
    with pytest.raises(WorkerDied, match=r"died \(exit code 3\) at block 4; 1 died"):
        list(items)
    assert list(items) == []


@pytest.mark.parametrize("workers", [
    Workers(2, 1, timeout=1.0, max_restarts=9), Workers(2, 1, timeout=99, max_restarts=9, together=2, patience=3.0),
])  # fmt: skip
def test_workers_that_hang_are_replaced_within_their_timeout_or_the_patience_for_a_step(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    items = ReadAhead(Blocks(), range(8), workers)
    got = [next(items) for _ in range(2)]
    pids = items.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # wherever they are: within a message, too
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        got += [next(items) for _ in range(2)]
    assert time.monotonic() - began < 3.0
    assert got + list(items) == plain(range(8))
    assert items.restarts >= 1  # the pipe of the other may have held an item
    assert re.search("hung, (1|1.5|0.75) s without an item", caplog.text)
    assert not any(is_running(pid) for pid in pids)


def test_workers_that_hang_again_and_again_end_the_run_within_its_patience() -> None:
    items = ReadAhead(
        Blocks(lambda k: time.sleep(99 * (k == 1))), range(9), Workers(1, 1, timeout=99, max_restarts=2, patience=2.0)
    )
    next(items)
    began = time.monotonic()
    with pytest.raises(WorkerDied, match=r"hung, 0\.\d+ s without an item, .*; 3 died on this rank"):
        next(items)
    assert 1.0 < time.monotonic() - began < 2.0  # half of 2 s, then a quarter and an eighth


@pytest.mark.parametrize("hang_minutes", [0, 0.02, 4.9])
@pytest.mark.parametrize("worker_timeout", [0, 1.0, 1e6])
def test_a_stuck_worker_is_replaced_before_its_rank_counts_as_hanging(
    tiny_data: Path, hang_minutes: float, worker_timeout: float
) -> None:
    config = config_with(tiny_data, {"worker_timeout": worker_timeout}, faults={"hang_minutes": hang_minutes})
    settings = Loader(config, built(config))._reader._settings
    assert settings.patience < 60 * (hang_minutes or 0.8 * config.parallel.timeout_minutes)
    assert settings.together == config.train.num_microbatches
    assert settings.timeout == worker_timeout or not worker_timeout


def test_a_worker_that_cannot_die_holds_no_connection_of_its_rank() -> None:
    here, there = socket.socketpair()

    def rank() -> None:
        here.close()
        items = start_endless()
        next(items), next(items)  # each of the three is at work
        for pid in items.pids:
            os.kill(pid, signal.SIGSTOP)
        there.send(" ".join(map(str, items.pids)).encode())
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    there.close()
    here.settimeout(20)
    pids = [int(pid) for pid in here.recv(999).split()]
    try:
        assert here.recv(1) == b"", "the peer sees that the rank has ended"
        assert all(is_running(pid) for pid in pids)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        process.join(20)


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("raised, kind, message", [
    (ValueError("shard x was changed; restore it"), ValueError, "^shard x was changed; restore it$"),
    (KeyError("bug"), RuntimeError, r"a data worker failed: Traceback(.|\n)*KeyError: 'bug'"),
])  # fmt: skip
def test_what_a_worker_raises_ends_the_run_with_its_reason(
    raised: Exception, kind: type[Exception], message: str
) -> None:
    items = ReadAhead(Blocks(lambda k: _raise(raised) if k == 5 else None), range(20), Workers(3, 4))
    assert [next(items) for _ in range(5)] == plain(range(5))
    pids = items.pids
    with pytest.raises(kind, match=message):
        next(items)
    assert items.restarts == 0
    assert not any(is_running(pid) for pid in pids)


class _Warned(Exception):
    pass


def test_a_signal_in_the_middle_of_a_message_loses_no_item() -> None:
    items = ReadAhead(Blocks(), range(6), Workers(1, 1))
    got = [next(items)]
    (pid,) = items.pids
    time.sleep(0.3)  # the next message has filled the pipe
    os.kill(pid, signal.SIGSTOP)
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    previous = signal.signal(signal.SIGALRM, lambda *_: _raise(_Warned()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(_Warned):
            next(items)
    finally:
        signal.signal(signal.SIGALRM, previous)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    assert [*got, *items] == plain(range(6))


def test_workers_outlive_the_warning_that_a_cluster_sends_to_every_process() -> None:
    items = ReadAhead(Blocks(), range(30), Workers(2, 1, max_restarts=0))
    got = [next(items), next(items)]
    for pid in items.pids:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(pid, number)
    assert got + list(items) == plain(range(30))


@pytest.mark.parametrize("end", ["close", "forget"])
def test_an_abandoned_loader_leaves_no_process(tiny_data: Path, end: str) -> None:
    config = config_with(tiny_data, {"num_workers": 3, "prefetch": 2})
    loader = Loader(config, built(config), stop_step=20)
    next(loader)
    pids = loader.worker_pids
    os.kill(pids[0], signal.SIGSTOP)
    assert len(pids) == 3
    began = time.monotonic()
    if end == "close":
        with loader:
            pass
        assert not any(is_running(pid) for pid in pids)
        loader.close()
        assert list(loader) == []
    else:
        del loader
        gc.collect()
    assert not any(is_running(pid) for pid in pids)
    assert time.monotonic() - began < 5  # a kill and a wait for it: milliseconds


def start_endless() -> ReadAhead[bytes]:
    """Three workers that have delivered an item, one of them busy for long, the others in a message."""
    items = ReadAhead(Blocks(lambda k: time.sleep(99 * (k == 3))), range(10**9), Workers(3, 2))
    next(items)
    return items


@pytest.mark.parametrize("end", [
    lambda: None, lambda: sys.exit(3), lambda: os._exit(4),
    lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: os.kill(os.getpid(), signal.SIGTERM),
])  # fmt: skip
def test_workers_end_with_their_rank_however_it_ends(end: Callable[[], None]) -> None:
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)

    def rank() -> None:
        items = start_endless()
        writer.send(items.pids)
        end()

    process = context.Process(target=rank)
    process.start()
    pids = reader.recv()
    process.join(20)
    assert process.exitcode is not None
    assert len(pids) == 3
    deadline = time.monotonic() + 20
    while running := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, running
        time.sleep(0.02)
