"""Forked ranks that stop making progress, each in its way; every one must end, and say which rank is waited for."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmmoe_pretrain.exit_codes import HUNG
from mmmoe_pretrain.parallel.runtime import process_group
from mmmoe_pretrain.train.heartbeats import Heartbeat, describe, stalled_ranks
from mmmoe_pretrain.train.watchdog import Watchdog
from tests.distributed import free_port
from tests.support import tiny_config

LIMIT = 1.5  # seconds without progress
END = 20.0  # seconds in which all must have ended: the limit, twice that if rank 0 has ended, and a loaded machine
Body = Callable[[int, Watchdog], None]


@dataclass(frozen=True)
class Ended:
    codes: list[int | None]  # by rank; None: still there
    message: str
    folder: Path


def start(ranks: int, root: Path, body: Body, limit: float = LIMIT) -> list[ForkProcess]:
    """``body`` on forked ranks under a watchdog."""
    context, port = multiprocessing.get_context("fork"), free_port()
    forked = [context.Process(target=_rank, args=(rank, ranks, port, root, body, limit)) for rank in range(ranks)]
    for process in forked:
        process.start()
    return forked


def finish(forked: list[ForkProcess], root: Path, stays: int = -1) -> Ended:
    """How they end; rank ``stays`` cannot end itself."""
    deadline = time.monotonic() + END
    while time.monotonic() < deadline and any(p.is_alive() for rank, p in enumerate(forked) if rank != stays):
        time.sleep(0.05)
    codes = [process.exitcode for process in forked]
    for process in forked:
        process.kill()
        process.join()
    (folder,) = (root / "hangs").glob("*") if (root / "hangs").exists() else (root,)
    message = folder / "message.txt"
    return Ended(codes, message.read_text() if message.exists() else "", folder)


def run(ranks: int, root: Path, body: Body, limit: float = LIMIT) -> Ended:
    return finish(start(ranks, root, body, limit), root)


def _rank(rank: int, ranks: int, port: int, root: Path, body: Body, limit: float) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    with process_group(5), Watchdog(root, dist.group.WORLD, limit) as watchdog:
        body(rank, watchdog)


def steps(rank: int, watchdog: Watchdog, count: int, bad: int = -1, fault: Callable[[], None] = lambda: None) -> None:
    """A loop of two phases with a collective; ``fault`` on rank ``bad`` in step 3, before the collective."""
    for step in range(count):
        watchdog.beat(step, "data")
        time.sleep(0.02)
        watchdog.beat(step, "step")
        if rank == bad and step == 3:
            fault()
        dist.all_reduce(torch.ones(4))


def spin() -> None:
    while True:
        sum(range(1000))


def hold_pythons_lock() -> None:
    ctypes.PyDLL(None).sleep(1000)  # C code called without releasing the lock: no thread of this rank runs


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_healthy_run_ends_undisturbed_and_leaves_nothing(tmp_path: Path) -> None:
    def body(rank: int, watchdog: Watchdog) -> None:
        steps(rank, watchdog, 4)
        if rank:
            watchdog.close()  # ends early, and the others run for longer than the limit
        else:
            for step in range(4, 40):
                watchdog.beat(step, "data")
                time.sleep(0.05)

    ended = run(3, tmp_path, body, limit=1.0)
    assert ended.codes == [0, 0, 0] and not (tmp_path / "hangs").exists()


def test_an_endless_loop_is_named_and_every_rank_ends_with_its_stacks(tmp_path: Path) -> None:
    ended = run(3, tmp_path, lambda rank, dog: steps(rank, dog, 9, 1, spin))
    assert ended.codes == [HUNG] * 3, ended
    assert "The others wait for rank 1 (in no collective, as the others are)." in ended.message
    assert 'ranks 0, 2: in step 3, "step" for' in ended.message and "in gloo:all_reduce #" in ended.message
    assert "spin" in (ended.folder / "rank_00001.txt").read_text()
    assert "all_reduce" in (ended.folder / "rank_00002.txt").read_text()
    record = json.loads((ended.folder / "flight_00000.json").read_text())["entries"]
    assert [entry["retired"] for entry in record] == [True] * (len(record) - 1) + [False]


def killed_unnoticed(rank: int, watchdog: Watchdog) -> None:
    """Rank 2's machine died: gloo would report it at once if that still ran; here no rank is notified."""
    steps(rank, watchdog, 3)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    watchdog.beat(3, "step")
    time.sleep(1000)


def test_a_rank_that_is_stopped_killed_or_stuck_in_c_code_is_named_and_the_others_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At most three jobs at a time: more keep the two cores of a small machine busy for longer than the limit."""
    killed = start(3, tmp_path / "killed", killed_unnoticed)
    for fault in (stop, hold_pythons_lock):
        roots = [tmp_path / f"{fault.__name__}{bad}" for bad in (0, 1)]
        jobs = [
            start(3, root, lambda rank, dog, bad=bad, fault=fault: steps(rank, dog, 9, bad, fault))
            for bad, root in enumerate(roots)
        ]
        endings = [finish(job, root, stays=bad) for bad, (job, root) in enumerate(zip(jobs, roots, strict=True))]
        for bad, ended in enumerate(endings):
            assert ended.codes == [None if rank == bad else HUNG for rank in range(3)], ended
            assert f"The others wait for rank {bad} (silent" in ended.message
            assert f'  ranks {"1-2" if bad == 0 else "0, 2"}: in step 3, "step" for' in ended.message
    ended = finish(killed, tmp_path / "killed")
    assert ended.codes == [HUNG, HUNG, -signal.SIGKILL], ended
    assert "The others wait for rank 2 (silent" in ended.message
    error = capfd.readouterr().err
    assert error.count("The job hangs") == 5
    assert "in hold_pythons_lock" in error  # the stuck rank's own stack, by a timer without Python


def test_slow_phases_and_steps_after_a_slow_one_may_take_longer_and_their_waiting_peers_may_wait(
    tmp_path: Path,
) -> None:
    def body(rank: int, watchdog: Watchdog) -> None:
        watchdog.beat(1, "compile")  # the first step has an allowance, and tells how long steps take
        time.sleep(1.5)
        for step, phase in ((2, "step"), (3, "step"), (3, "save")):
            watchdog.beat(step, "data")
            watchdog.beat(step, phase)
            if rank == 1:  # rank 0 waits for it
                time.sleep(1.5)
            dist.barrier()
        watchdog.beat(4, "data")

    assert run(2, tmp_path, body, limit=1.0).codes == [0, 0]


def test_a_step_may_take_three_times_the_slowest_plain_one_and_no_more() -> None:
    step = Heartbeat(0, 5, "step", age=40.0)
    assert stalled_ranks({0: replace(step, longest=9.0)}, 30.0) == [0]
    assert stalled_ranks({0: replace(step, longest=14.0)}, 30.0) == []
    waiting = {0: replace(step, longest=1.0), 1: replace(step, rank=1, longest=14.0)}
    assert stalled_ranks(waiting, 30.0) == [], "rank 0 may wait for rank 1"


def test_what_compiling_took_is_forgotten_after_a_plain_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Watchdog(tmp_path, None, 1000.0) as watchdog:
        clock = [0.0]
        monkeypatch.setattr("mmmoe_pretrain.train.watchdog.time.monotonic", lambda: clock[0])
        longest = []
        for seconds, phase in ((50, "compile"), (7, "step"), (500, "data"), (9, "step"), (8, "step"), (1, "data")):
            watchdog.beat(1, phase)
            longest.append(watchdog._longest)
            clock[0] += seconds
        monkeypatch.undo()
    assert longest == [0.0, 50, 7, 7, 9, 9]


def test_one_process_watches_itself(tmp_path: Path) -> None:
    def body(rank: int, watchdog: Watchdog) -> None:
        watchdog.close()
        with Watchdog(tmp_path, None, 1.0) as alone:
            alone.beat(7, "data")
            spin()

    ended = run(1, tmp_path, body)
    assert ended.codes == [HUNG] and 'no progress of rank 0 for 1 s, in step 7, "data"' in ended.message


def test_a_suspended_and_resumed_process_continues(tmp_path: Path) -> None:
    def body(rank: int, watchdog: Watchdog) -> None:
        watchdog.close()
        with Watchdog(tmp_path, None, 1.0) as alone:
            alone.beat(0, "step")
            if os.fork() == 0:
                time.sleep(2.0)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.wait()

    assert run(1, tmp_path, body).codes == [0]


def test_the_message_groups_ranks_that_stand_alike() -> None:
    waiting = {rank: Heartbeat(rank, 57, "step", 1, 300.0 + rank, waits_in="nccl:all_reduce #9 of group data")
               for rank in range(1000)}  # fmt: skip
    beats = waiting | {700: Heartbeat(700, 57, "data", 0, 301.0, where="corpus.py:33 read")}
    assert describe("why", beats, [], 76, "runs/x").splitlines() == [
        "The job hangs: why. It ends with exit code 76; the stacks of all ranks are in runs/x.",
        "The others wait for rank 700 (behind the others).",
        '  rank 700: in step 57, "data" for 301 s, at corpus.py:33 read',
        '  ranks 0-699, 701-999: in step 57, "step" for 300 to 1299 s, in nccl:all_reduce #9 of group data',
    ]


def test_where_all_wait_alike_no_rank_is_named() -> None:
    beats = {rank: Heartbeat(rank, 5, "step", 1, 9.0, waits_in=f"gloo:broadcast #{rank}") for rank in range(2)}
    assert "No rank is behind the others" in describe("why", beats, [], 76, "")


def test_a_rank_that_left_is_what_the_others_wait_for() -> None:
    beats = {0: Heartbeat(0, 5, "step"), 1: Heartbeat(1, 5, "data", left="ValueError: no more data")}
    message = describe("why", beats, [], 76, "")
    assert "wait for rank 1 (has left)" in message and "rank 1: left: ValueError: no more data" in message


def test_a_hang_is_noticed_before_collectives_time_out(tmp_path: Path) -> None:
    assert tiny_config(tmp_path).hang_seconds < 60 * tiny_config(tmp_path).parallel.timeout_minutes
    with pytest.raises(
        ValueError, match=r"hang_minutes 5 is not below parallel.timeout_minutes 5: .* timeout_minutes: 6"
    ):
        tiny_config(tmp_path, faults={"hang_minutes": 5})
