"""Ends a job that hangs. A daemon thread on every rank publishes the progress of its main thread as heartbeats. Rank
0 checks the heartbeats of all ranks, and the others check that of rank 0. When the job hangs, every rank writes its
stacks to RUN/hangs/START/, one rank prints which ranks hang, and all exit with ``exit_codes.HUNG``. A rank that is
stopped, or stuck in C code that holds the GIL, cannot exit: the launcher kills it when the others have exited.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType

import torch._C._distributed_c10d as c10d
import torch.distributed as dist

from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.train import heartbeats
from mmmoe_pretrain.train.heartbeats import Heartbeat, HeartbeatStore, NoAnswer, StoreGone, open_store, start_name

MAX_TICK = 5.0  # seconds between two heartbeats
ANSWER = 2.0  # seconds to wait for the store when the process is about to exit
GOODBYE = 10.0  # seconds that rank 0 serves the store after its own end
_COLLECTIVES = "/torch/distributed/"


class Watchdog:
    """``with Watchdog(run, control_group, config.hang_seconds) as watchdog: ... watchdog.beat(step, "data")``.

    Phases of ``heartbeats.ALLOWANCE`` may take longer than ``hang_seconds``, and so may a step after a slow step.
    """

    def __init__(self, run: Path, group: dist.ProcessGroup | None, hang_seconds: float) -> None:
        """Collective over ``group`` (all ranks, on the host; None in one process)."""
        self._limit, self._tick = hang_seconds, min(MAX_TICK, hang_seconds / 8)
        self._store: HeartbeatStore | None = None
        self._rank, self._ranks, name = 0, 1, start_name()
        if group is not None:
            self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
            self._store, name = open_store(group, hang_seconds)
        self._folder = run / "hangs" / name
        self._place = self._place_before = (0, "start", 0)  # step, phase, beats of the step
        self._began = time.monotonic()  # the phase
        self._longest, self._plain_steps = 0.0, False
        self._own = Heartbeat(self._rank)
        self._known: dict[int, Heartbeat] = {}  # of those that this rank reads
        self._silence: dict[int, float] = {}
        self._clock = time.monotonic()
        self._closed, self._ending = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close("done" if kind is None else f"{kind.__name__}: {str(error)[:200]}")

    def beat(self, step: int, phase: str) -> None:
        """The main thread begins ``phase`` of ``step``. Cheap; the same calls on every rank."""
        before, ended, count = self._place
        now = time.monotonic()
        if ended == "compile" or (ended == "step" and not self._plain_steps):
            self._longest = now - self._began  # replaced by the first plain step, which compiles nothing
        elif ended == "step":
            self._longest = max(self._longest, now - self._began)
        self._plain_steps |= ended == "step"
        self._began = now
        self._place = (step, phase, count + 1 if step == before else 0)

    def close(self, reason: str = "done") -> None:
        """Publish that this rank ends and does not hang. May be called twice.

        With ``reason`` "done" rank 0 waits up to GOODBYE seconds for the others to end, since it serves the store.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join(self._tick + 1)
        if self._ending:
            self._thread.join()  # it ends this process, also after an error of the main thread
        if self._store is None or self._thread.is_alive():
            return
        with suppress(NoAnswer, StoreGone):
            self._store.publish(replace(self._own, left=reason, sequence=self._own.sequence + 1), ANSWER)
            deadline = time.monotonic() + GOODBYE
            while self._rank == 0 and reason == "done" and time.monotonic() < deadline:
                if all(beat.left for beat in self._store.read(range(1, self._ranks), ANSWER)[1].values()):
                    break
                time.sleep(min(0.1, self._tick))
        self._store = None

    def _watch(self) -> None:
        while True:
            # A timer outside Python: the stack of a main thread that holds the GIL.
            faulthandler.dump_traceback_later(0.75 * self._limit, file=2)
            closed = self._closed.wait(self._tick)
            faulthandler.cancel_dump_traceback_later()  # below it may have to wait for rank 0
            if closed:
                return
            reason = self._judge(self._advance())
            if reason and not self._closed.is_set():
                self._end(reason)

    def _advance(self) -> float:
        """Note the main thread's progress; the seconds since the last call. Of the time that a process was suspended
        or could not run, little counts."""
        now = time.monotonic()
        passed = min(now - self._clock, 2 * self._tick)
        self._clock, place = now, self._place
        age = 0.0 if place is not self._place_before else self._own.age + passed
        self._place_before = place
        self._own = Heartbeat(self._rank, *place, age=age, longest=self._longest, sequence=self._own.sequence + 1)
        return passed

    def _judge(self, passed: float) -> str:
        """Why the job hangs, or an empty string. Publishes this rank's heartbeat and reads the others'."""
        if self._store is not None:
            try:
                self._store.publish(self._own, self._limit)
                hang, beats = self._store.read(range(self._ranks) if self._rank == 0 else [0], self._limit)
            except NoAnswer as error:
                self._store = None
                return str(error)
            except StoreGone:  # the launcher sees that, too
                self._store = None
            else:
                return hang or self._check_others(beats, passed)
        return self._reason("no progress", heartbeats.stalled_ranks({self._rank: self._own}, self._limit))

    def _check_others(self, beats: dict[int, Heartbeat], passed: float) -> str:
        for rank, beat in beats.items():
            same = rank in self._known and self._known[rank].sequence == beat.sequence
            self._silence[rank] = self._silence.get(rank, 0.0) + passed if same else 0.0
        self._known = beats
        reason = self._reason("no heartbeat", heartbeats.silent_ranks(beats, self._silence, self._limit))
        if not reason and self._rank == 0:  # only rank 0 sees whether some rank is in a slow phase
            reason = self._reason("no progress", heartbeats.stalled_ranks(beats, self._limit))
        return reason

    def _reason(self, what: str, ranks: list[int]) -> str:
        """For the first of ``ranks``; the message names the others."""
        if not ranks:
            return ""
        beat = self._own if ranks[0] == self._rank else self._known[ranks[0]]
        limit = self._limit if what == "no heartbeat" else heartbeats.allowed(beat, self._limit)
        return f'{what} of rank {beat.rank} for {limit:.0f} s, in step {beat.step}, "{beat.phase}"'

    def _end(self, reason: str) -> None:
        """Never returns."""
        self._ending = True
        grace = 1.0 + 3 * self._tick
        faulthandler.dump_traceback_later(10 * grace, exit=True)  # should anything below hang as well
        try:
            with suppress(OSError, ValueError):
                self._publish_stacks(reason)
            self._report(reason, grace)
        finally:
            with suppress(OSError):
                exit_codes.record(exit_codes.HUNG)
            os._exit(exit_codes.HUNG)

    def _publish_stacks(self, reason: str) -> None:
        """Send it to the other ranks through the store, and write it to files in case rank 0 has ended."""
        where, collective = _main_thread()
        record = _flight_record()
        waits_in = _pending_collective(record) or ("a collective" if collective else "")
        self._own = replace(self._own, final=True, where=where, waits_in=waits_in)
        if self._store is not None:
            with suppress(NoAnswer, StoreGone):
                self._store.publish_hang(reason, ANSWER)
                self._store.publish(self._own, ANSWER)
        self._folder.mkdir(parents=True, exist_ok=True)
        _write_stacks(self._folder / f"rank_{self._rank:05d}.txt", self._own.to_json())
        if record:
            (self._folder / f"flight_{self._rank:05d}.json").write_bytes(record)

    def _report(self, reason: str, grace: float) -> None:
        """The first rank to arrive gathers, prints and writes the message; the others wait for it."""
        path = self._folder / "message.txt"
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            deadline = time.monotonic() + 2 * grace
            while time.monotonic() < deadline and not path.stat().st_size:
                time.sleep(0.1)
            return
        except OSError:  # no place to write: then every rank prints
            pass
        beats = self._gather(time.monotonic() + grace)
        silent = [rank for rank, beat in beats.items() if not (beat.final or beat.left)]
        message = heartbeats.describe(reason, beats, silent, exit_codes.HUNG, str(self._folder))
        os.write(2, f"{message}\n".encode())  # not through sys.stderr: the main thread may hold its lock
        with suppress(OSError):
            path.write_text(message + "\n", encoding="utf-8")

    def _gather(self, deadline: float) -> dict[int, Heartbeat]:
        """The final heartbeats of all ranks, as many as arrive in time; else the last one known here."""
        beats = {rank: self._known.get(rank, Heartbeat(rank)) for rank in range(self._ranks)} | {
            self._rank: self._own
        }
        while True:
            if self._store is not None:
                try:
                    beats |= self._store.read(range(self._ranks), ANSWER)[1]
                except (NoAnswer, StoreGone):
                    self._store = None
            for rank, beat in beats.items():
                if not (beat.final or beat.left):
                    with suppress(OSError, ValueError):
                        text = (self._folder / f"rank_{rank:05d}.txt").read_text(encoding="utf-8")
                        beats[rank] = Heartbeat.from_json(text.partition("\n")[0])
            if all(beat.final or beat.left for beat in beats.values()) or time.monotonic() > deadline:
                return beats
            time.sleep(0.1)


def _write_stacks(path: Path, title: str) -> None:
    """The stacks of all threads."""
    with path.open("w", encoding="utf-8") as file:
        file.write(title + "\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def _flight_record() -> bytes:
    """The latest collectives of this process, gloo's and NCCL's, as JSON; empty without a recorder. torch keeps
    TORCH_FR_BUFFER_SIZE of them: 2000, unless it is set."""
    dump = getattr(c10d, "_dump_fr_trace_json", None)
    return b"" if dump is None else bytes(dump())


def _pending_collective(record: bytes) -> str:
    """The oldest one in ``record`` that has not ended, e.g. "gloo:all_reduce #4 of default_pg". Those of other
    Python threads (a save in flight) do not count; autograd's threads are not Python's."""
    others = {
        str(thread.ident)
        for thread in threading.enumerate()
        if thread is not threading.main_thread() and not isinstance(thread, threading._DummyThread)
    }
    for entry in json.loads(record)["entries"] if record else ():
        if not entry["retired"] and entry.get("thread_id") not in others:
            number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
            name = " ".join(dict.fromkeys(part for part in reversed(entry["process_group"]) if part))
            return f"{entry['profiling_name']} #{number} of group {name}"
    return ""


def _main_thread() -> tuple[str, bool]:
    """Where the main thread is, outside of torch, e.g. "loop.py:120 _run", and whether in a collective."""
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    collective = False
    while frame is not None:
        file = frame.f_code.co_filename.replace("\\", "/")
        collective = collective or _COLLECTIVES in file
        if "/torch/" not in file:
            return f"{Path(file).name}:{frame.f_lineno} {frame.f_code.co_name}", collective
        frame = frame.f_back
    return "", collective
