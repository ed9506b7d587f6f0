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
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain import cli, exit_codes
from mmmoe_pretrain.data.loader import Loader, Made, MicrobatchDataset
from mmmoe_pretrain.data.storage.stores import ChangedError
from mmmoe_pretrain.data.workers.arena import STRIDE
from mmmoe_pretrain.data.workers.dispatch import CREDIT, Dispatcher
from mmmoe_pretrain.data.workers.read_ahead import ReadAhead, WorkerDied, Workers
from mmmoe_pretrain.data.workers.worker import Fork, _received, run_worker
from mmmoe_pretrain.exit_codes import Restartable
from mmmoe_pretrain.urls import UnavailableError
from tests.data.test_loader import built, config_with

pytestmark = pytest.mark.timeout(60)
LARGE = 100_000  # numbers of an item
SAMPLES = 5


@dataclass(frozen=True)
class Blocks:
    """Item k is drawn from seed k, in SAMPLES equal pieces; ``fault(k, sample)`` runs before, in the worker."""

    fault: Callable[[int, int], object] = lambda k, sample: None
    pinned: bool = False

    def count(self, k: int) -> int:
        return SAMPLES

    def pins(self, k: int) -> list[int | None]:
        return [sample if self.pinned else None for sample in range(SAMPLES)]

    def samples(self, k: int, which: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
        for sample in which:
            self.fault(k, sample)
            yield np.random.default_rng((k, sample)).integers(0, 99, LARGE // SAMPLES), os.getpid()

    def pack(self, k: int, samples: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, list[int]]:
        return np.concatenate([values for values, _ in samples]), [pid for _, pid in samples]

    def describe(self, k: int, sample: int | None) -> str:
        return f"sample {sample} of block {k}"


class Items:
    """A ``ReadAhead`` of blocks, compared by content."""

    def __init__(self, source: Blocks, numbers: range, workers: Workers, fork: Fork | None = None) -> None:
        self.reader = ReadAhead(source, numbers, workers, fork=fork)

    def __iter__(self) -> Items:
        return self

    def __next__(self) -> bytes:
        return next(self.reader)[0].tobytes()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.reader, name)


def plain(numbers: range) -> list[bytes]:
    blocks = Blocks()
    return [blocks.pack(k, list(blocks.samples(k, range(SAMPLES))))[0].tobytes() for k in numbers]


def descriptors() -> set[tuple[str, str]]:
    """Number and target of each that is open."""
    found = {(number, os.path.realpath(f"/proc/self/fd/{number}")) for number in os.listdir("/proc/self/fd")}
    return {(number, target) for number, target in found if os.path.lexists(f"/proc/self/fd/{number}")}


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


@pytest.mark.parametrize("count, prefetch", [(0, 1), (1, 1), (1, 5), (3, 2), (7, 1)])
def test_items_come_in_order_and_the_workers_end_with_the_last(count: int, prefetch: int) -> None:
    items = Items(Blocks(), range(3, 15, 2), Workers(count, prefetch))
    first = next(items)
    pids = items.pids
    assert len(pids) == count
    assert [first, *items] == plain(range(3, 15, 2))
    assert not any(is_running(pid) for pid in pids)
    assert items.restarts == 0


def test_what_the_first_item_needs_is_computed_once_before_the_workers_are_forked() -> None:
    known: list[int] = []

    class Remembering(Blocks):
        def describe(self, k: int, sample: int | None) -> str:
            known.append(k)
            return super().describe(k, sample)

        def samples(self, k: int, which: Sequence[int]) -> Iterator[tuple[np.ndarray, int]]:
            assert known, "the worker was forked before"
            return super().samples(k, which)

    assert list(Items(Remembering(), range(3), Workers(1))) == plain(range(3))


def test_no_more_than_the_given_number_of_items_are_made_ahead(tmp_path: Path) -> None:
    items = Items(Blocks(lambda k, s: (tmp_path / f"{k}-{s}").touch()), range(100), Workers(2, ahead=3))
    next(items)
    while len(list(tmp_path.iterdir())) < 4 * SAMPLES:  # of the one delivered, and of three
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) == 4 * SAMPLES
    items.close()


def test_a_slow_sample_delays_none_of_those_behind_it(tmp_path: Path) -> None:
    def fault(k: int, sample: int) -> None:
        if (k, sample) == (1, 0):
            wait_for(tmp_path / "go")
        (tmp_path / f"{k}-{sample}").touch()

    items = Items(Blocks(fault), range(9), Workers(2, ahead=4))
    got = [next(items)]
    deadline = time.monotonic() + 20
    while len(made := {path.name for path in tmp_path.iterdir()}) < 5 * SAMPLES - CREDIT * 3:
        assert time.monotonic() < deadline, made  # a task has 3 samples at most, since there are two workers
        time.sleep(0.01)
    assert "1-0" not in made
    (tmp_path / "go").touch()
    assert got + list(items) == plain(range(9))


def test_pinned_samples_are_made_by_one_worker_each_in_order(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def fault(k: int, sample: int) -> None:
        with log.open("a") as file:
            file.write(f"{sample} {k} {os.getpid()}\n")

    list(Items(Blocks(fault, pinned=True), range(6), Workers(2, ahead=4)))
    lines = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    for sample in range(SAMPLES):
        assert [k for s, k, _ in lines if s == sample] == list(range(6))
        assert len({pid for s, _, pid in lines if s == sample}) == 1
    assert len({pid for *_, pid in lines}) == 2


def test_what_was_delivered_is_freed_with_its_last_view_and_outlives_the_workers() -> None:
    def shared() -> int:
        return sum("mmmoe data" in line for line in Path("/proc/self/maps").read_text().splitlines())

    maps, before = shared(), descriptors()
    reader = ReadAhead(Blocks(), range(60), Workers(2, ahead=2))
    first, _ = next(reader)
    for number, (values, _) in enumerate(reader):
        del values
        if number > 10:
            assert shared() - maps <= 3  # ``first``, the latest, and the one after it
            assert len(descriptors() - before) <= 20  # of 60
            memory = (
                os.stat(f"/proc/self/fd/{reader._running[0].arenas[1]}").st_blocks * 512 if reader._running else 0
            )
            assert memory < 6 * 9 * LARGE  # of 60 items of 8 * LARGE bytes
    assert shared() - maps == 1
    assert first.tobytes() == plain(range(1))[0]
    del first
    assert shared() == maps and not descriptors() - before


def test_little_is_read_ahead_of_items_that_fill_the_bytes_allowed(tmp_path: Path) -> None:
    items = Items(
        Blocks(lambda k, s: (tmp_path / f"{k}-{s}").touch()), range(40), Workers(1, ahead=30, ahead_bytes=10 * LARGE)
    )
    got = [next(items)]
    time.sleep(0.2)
    assert len(list(tmp_path.iterdir())) < 5 * SAMPLES  # an item has 8 * LARGE bytes, a sample a fifth
    assert got + list(items) == plain(range(40))


def test_killing_workers_at_any_moment_changes_no_item() -> None:
    chance = random.Random(0)
    items = Items(Blocks(), range(60), Workers(3, 2, max_restarts=99))
    got = []
    for _ in range(60):
        got.append(next(items))
        if chance.random() < 0.3:
            time.sleep(chance.choice([0, 0.001, 0.01]))
            os.kill(chance.choice(items.pids), signal.SIGKILL)
    assert got == plain(range(60))
    assert items.restarts > 3  # of about 18 kills; one that was dead already is not counted again


def test_the_memory_of_killed_workers_is_used_again() -> None:
    items = Items(Blocks(lambda k, sample: time.sleep(0.01)), range(20), Workers(1, 2, max_restarts=20))
    for _ in range(20):
        next(items)
        slots = sum(os.fstat(arena).st_size // STRIDE for arena in items.reader._running[0].arenas)
        os.kill(items.pids[0], signal.SIGKILL)
    assert items.restarts > 10
    assert slots <= 2 * SAMPLES + CREDIT * 2 + 3, "of two items and the one that is held, and of tasks"


class _Deadly(MicrobatchDataset):
    def samples(self, number: int, which: Sequence[int]) -> Iterator[Made]:
        for sample in which:
            if (number, sample) == (3, 5):
                faulthandler.disable()  # pytest's: it would report this one
                os.kill(os.getpid(), signal.SIGSEGV)
            yield from super().samples(number, [sample])


def test_a_sample_that_kills_every_worker_ends_the_run_and_is_named(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with(tiny_data, {"num_workers": 2}, faults={"max_worker_restarts": 2})
    modalities = built(config)
    expected = list(Loader(config_with(tiny_data), modalities, stop_step=2))[1].microbatches[1].metas[5].key
    monkeypatch.setattr("mmmoe_pretrain.data.loader.MicrobatchDataset", _Deadly)
    loader = Loader(config, modalities, stop_step=9)
    with pytest.raises(WorkerDied, match=rf"died \(SIGSEGV\) at batch 1, sample {expected}; 3 died on this rank"):
        list(loader)  # whether or not what was read before had been taken
    assert loader.worker_pids == []


def test_a_worker_that_cannot_be_started_again_is_not_said_to_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise Restartable("the server has ended")

    items = Items(Blocks(), range(10**9), Workers(1, 2))
    next(items)
    monkeypatch.setattr(ReadAhead, "_fork", fails)
    os.kill(items.pids[0], signal.SIGKILL)
    with caplog.at_level(logging.WARNING), pytest.raises(Restartable, match="the server has ended"):
        list(items)
    assert "started again" not in caplog.text and not items.pids


def test_deaths_that_lie_further_apart_than_the_window_end_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    within = 0.5
    monkeypatch.setattr("mmmoe_pretrain.data.workers.read_ahead.RESTARTS_WITHIN", within)
    items = Items(Blocks(), range(12), Workers(1, 1, max_restarts=1))
    got = []
    for _ in range(3):
        got.append(next(items))
        os.kill(items.pids[0], signal.SIGKILL)
        got += [next(items), next(items)]  # the second is not made before the death is seen
        time.sleep(within)
    assert items.restarts == 3
    assert got + list(items) == plain(range(12))


def test_without_restarts_the_first_death_ends_the_run() -> None:
    items = Items(
        Blocks(lambda k, s: os._exit(3) if (k, s) == (4, 2) else None), range(9), Workers(2, 1, max_restarts=0)
    )
    with pytest.raises(WorkerDied, match=r"died \(exit code 3\) at sample 2 of block 4; 1 died"):
        list(items)
    assert list(items) == []


def test_the_command_tells_that_workers_died_in_one_line_and_may_be_started_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = Items(Blocks(lambda k, s: os._exit(3)), range(9), Workers(1, 1, max_restarts=0))
    monkeypatch.setattr(cli, "app", lambda: list(items))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == exit_codes.FAULT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mmmoe: a data worker died (exit code 3) at sample 0 of block 0; 1 died on this rank")


def test_starting_a_worker_may_take_the_patience_for_a_step_and_replacing_one_a_fourth_of_it() -> None:
    given = []

    def fork(descriptors: Sequence[int], seconds: float) -> BaseProcess:
        given.append(seconds)
        process = multiprocessing.get_context("fork").Process(target=run_worker, args=(Blocks(), descriptors))
        process.start()
        return process

    items = Items(Blocks(), range(9), Workers(1, 1, patience=40.0), fork)
    got = [next(items)]
    os.kill(items.pids[0], signal.SIGKILL)
    assert got + list(items) == plain(range(9))
    assert given == [40.0, 10.0]


@pytest.mark.parametrize("workers", [
    Workers(2, 1, timeout=0.5, max_restarts=9), Workers(2, 1, timeout=99, max_restarts=9, together=2, patience=2.0),
])  # fmt: skip
def test_workers_that_hang_are_replaced_within_their_timeout_or_the_patience_for_a_step(
    workers: Workers, caplog: pytest.LogCaptureFixture
) -> None:
    items = Items(Blocks(), range(8), workers)
    got = [next(items) for _ in range(2)]
    pids = items.pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # wherever they are: within a message, too
    with caplog.at_level(logging.WARNING):
        got += [next(items) for _ in range(2)]
    assert got + list(items) == plain(range(8))
    assert items.restarts >= 1  # the pipe of the other may have held an item
    assert re.search(r"hung, (0\.5|1) s without an answer", caplog.text)
    assert not any(is_running(pid) for pid in pids)


def test_workers_that_hang_again_and_again_end_the_run_within_its_patience(caplog: pytest.LogCaptureFixture) -> None:
    items = Items(
        Blocks(lambda k, s: time.sleep(99 * (k == 1))),
        range(9),
        Workers(1, 1, timeout=99, max_restarts=2, patience=2.0),
    )
    next(items)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(WorkerDied, match=r"hung, .* s without an answer, .*; 3 died on this rank") as ended,
    ):
        next(items)
    waits = [float(seconds) for seconds in re.findall(r"hung, ([\d.e-]+) s", f"{caplog.text} {ended.value}")]
    assert waits[0] == 1.0 and waits[1] <= 0.5 and waits[2] <= 0.25 and len(waits) == 3  # each half of what is left


@pytest.mark.parametrize(("hang_minutes", "worker_timeout"), [(0, 1.0), (0.02, 0), (4.9, 1e6)])
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
    (UnavailableError("no answer"), Restartable, "^no answer$"),
    (KeyError("bug"), RuntimeError, r"a data worker failed: Traceback(.|\n)*KeyError: 'bug'"),
])  # fmt: skip
def test_what_a_worker_raises_ends_the_run_with_its_reason(
    raised: Exception, kind: type[Exception], message: str
) -> None:
    items = Items(Blocks(lambda k, s: _raise(raised) if k == 5 else None), range(20), Workers(3, 4))
    assert [next(items) for _ in range(5)] == plain(range(5))
    pids = items.pids
    with pytest.raises(kind, match=message):
        next(items)
    assert items.restarts == 0
    assert not any(is_running(pid) for pid in pids)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("raised, passing", [(ChangedError("x was changed"), False), (UnavailableError("x"), True)])
def test_a_replaced_shard_ends_the_run_for_good_with_and_without_workers(
    raised: Exception, passing: bool, count: int
) -> None:
    items = Items(Blocks(lambda k, s: _raise(raised)), range(3), Workers(count))
    with pytest.raises(ValueError, match=r"^x") as found:
        next(items)
    assert isinstance(found.value, Restartable | OSError) == passing, "by which the exit code is chosen"


class _Warned(Exception):
    pass


def test_a_signal_while_an_item_is_awaited_loses_none(tmp_path: Path) -> None:
    def handler(*_: object) -> None:
        (tmp_path / "go").touch()
        raise _Warned

    items = Items(Blocks(lambda k, s: wait_for(tmp_path / "go") if k == 1 else None), range(6), Workers(1, 1))
    got = [next(items)]
    previous = signal.signal(signal.SIGUSR2, handler)
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        with pytest.raises(_Warned):
            next(items)
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert [*got, *items] == plain(range(6))
    assert items.restarts == 0


def test_workers_outlive_the_warning_that_a_cluster_sends_to_every_process() -> None:
    items = Items(Blocks(), range(30), Workers(2, 1, max_restarts=0))
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


def start_endless() -> Items:
    """Three workers that have delivered an item, one of them busy for long, the others in a message."""
    items = Items(Blocks(lambda k, s: time.sleep(99 * (k == 3))), range(10**9), Workers(3, 2))
    next(items)
    return items


def test_a_worker_takes_the_reset_by_a_killed_rank_for_its_end() -> None:
    rank, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    worker.send(b"an answer that is never read")
    rank.close()
    with worker:
        assert _received(worker) == b""


@pytest.mark.parametrize("end", [lambda: None, lambda: os.kill(os.getpid(), signal.SIGKILL)])
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


class Unpickled:
    """Notes the thread that unpickles it."""

    def __reduce__(self) -> tuple[Callable[[], str], tuple[()]]:
        return thread_name, ()


def thread_name() -> str:
    return threading.current_thread().name


class Named(Blocks):
    def pack(self, k: int, samples: list[Any]) -> Any:
        return k, Unpickled()


def test_items_are_unpickled_and_finished_by_another_thread_and_few_are_held() -> None:
    finished: list[int] = []

    def finish(item: tuple[int, str]) -> tuple[int, str]:
        finished.append(item[0])
        return item[0], f"{item[1]}, {thread_name()}"

    reader: ReadAhead[Any] = ReadAhead(Named(), range(12), Workers(2, ahead=6, together=2), finish)
    got = [next(reader)]
    deadline = time.monotonic() + 20
    while len(finished) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    assert sorted(finished) == [0, 1, 2]  # the one taken, and the two of a step
    assert reader.is_ready(2) and not reader.is_ready(3)
    assert got + list(reader) == [(k, "data reading, data reading") for k in range(12)]


def test_an_error_of_the_thread_that_finishes_reaches_the_one_that_waits() -> None:
    def finish(item: tuple[int, str]) -> tuple[int, str]:
        if item[0] == 3:
            raise MemoryError("no pinned memory")
        return item

    reader: ReadAhead[Any] = ReadAhead(Named(), range(12), Workers(2), finish)
    with pytest.raises(RuntimeError, match=r"(?s)the dispatch of data failed: .*MemoryError: no pinned memory"):
        list(reader)
    assert not reader.pids


@pytest.mark.parametrize("name", ["_pump", "_to_load"])
def test_an_abandoned_reader_that_a_thread_of_its_own_collects_ends(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader: Any = ReadAhead(Blocks(), range(10**9), Workers(2, 4))
    next(reader)
    dispatcher, pids = reader._running[0], reader.pids
    reader.itself = reader  # so that only the garbage collector finds it
    plain, forgotten = getattr(Dispatcher, name), threading.Event()

    def collecting(its: Dispatcher) -> Any:
        if forgotten.is_set() and threading.current_thread() in dispatcher._threads:
            gc.collect()  # as any allocation may, here under the lock
        return plain(its)

    monkeypatch.setattr(Dispatcher, name, collecting)
    gc.disable()
    try:
        del reader
        forgotten.set()
        dispatcher._wake()
        with dispatcher.changed:
            dispatcher.changed.notify_all()
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            os.kill(pids[0], signal.SIGKILL)  # the end of a worker is an answer
        deadline = time.monotonic() + 10
        while any(thread.is_alive() for thread in dispatcher._threads) or any(map(is_running, pids)):
            assert time.monotonic() < deadline, [thread.name for thread in dispatcher._threads if thread.is_alive()]
            time.sleep(0.01)
    finally:
        gc.enable()
