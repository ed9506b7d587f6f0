"""Ends a job that hangs: every rank watches its own progress and hears of the others'.

A daemon thread on every rank publishes how far its main thread is. Rank 0 judges from everybody's beats,
and the others whether rank 0 still speaks; on a verdict every rank writes its stacks to
RUN/hangs/START/, one prints who waits for whom, and all end with ``exit_codes.HUNG``. A rank that holds
Python's lock in C code, or is stopped, cannot end itself: the launcher does when the others have.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.train import hangs, stacks
from mmmoe_pretrain.train.heartbeats import Beat, Board, Gone, NoAnswer, name_of_start, open_board

MAX_TICK = 5.0  # seconds between two beats of the thread
ANSWER = 2.0  # seconds that the store may take when the process is about to end
GOODBYE = 10.0  # seconds that rank 0 serves the others after its own end


class Watchdog:
    """``with Watchdog(run, control_group, config.hang_seconds) as watchdog: ... watchdog.beat(step, "data")``.

    Phases of ``hangs.ALLOWANCE`` may take longer than ``hang_seconds``, and so may a step where those before it did.
    """

    def __init__(self, run: Path, group: dist.ProcessGroup | None, hang_seconds: float) -> None:
        """Collective over ``group`` (all ranks, on the host; None in one process)."""
        self._limit, self._tick = hang_seconds, min(MAX_TICK, hang_seconds / 8)
        self._board: Board | None = None
        self._rank, self._ranks, name = 0, 1, name_of_start()
        if group is not None:
            self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
            self._board, name = open_board(group, hang_seconds)
        self._folder = run / "hangs" / name
        self._place = self._place_before = (0, "start", 0)  # step, phase, beats of the step
        self._began = time.monotonic()  # the phase
        self._longest, self._plain_steps = 0.0, False
        self._own = Beat(self._rank)
        self._known: dict[int, Beat] = {}  # of those that this rank reads
        self._silence: dict[int, float] = {}
        self._clock = time.monotonic()
        self._closed, self._ends = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close("done" if kind is None else f"{kind.__name__}: {str(error)[:200]}")

    def beat(self, step: int, phase: str) -> None:
        """The main thread goes on: it begins ``phase`` of ``step``. Cheap; the same calls on every rank."""
        before, ended, count = self._place
        now = time.monotonic()
        if ended == "compile" or (ended == "step" and not self._plain_steps):
            self._longest = now - self._began  # the first plain step, which compiles nothing, knows better
        elif ended == "step":
            self._longest = max(self._longest, now - self._began)
        self._plain_steps |= ended == "step"
        self._began = now
        self._place = (step, phase, count + 1 if step == before else 0)

    def close(self, reason: str = "done") -> None:
        """Say goodbye: this rank's silence from now on is no hang. May be called twice.

        With ``reason`` "done" rank 0 waits for the others' goodbyes, up to GOODBYE seconds, for it serves the store.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join(self._tick + 1)
        if self._ends:
            self._thread.join()  # it ends this process; what the main thread met with (a peer gone) came after
        if self._board is None or self._thread.is_alive():
            return
        with suppress(NoAnswer, Gone):
            self._board.publish(replace(self._own, left=reason, sequence=self._own.sequence + 1), ANSWER)
            deadline = time.monotonic() + GOODBYE
            while self._rank == 0 and reason == "done" and time.monotonic() < deadline:
                if all(beat.left for beat in self._board.look(range(1, self._ranks), ANSWER)[1].values()):
                    break
                time.sleep(min(0.1, self._tick))
        self._board = None

    def _watch(self) -> None:
        while True:
            # A timer without Python: the stack of a main thread that does not let go of Python's lock.
            faulthandler.dump_traceback_later(0.75 * self._limit, file=2)
            closed = self._closed.wait(self._tick)
            faulthandler.cancel_dump_traceback_later()  # below it may have to wait for rank 0
            if closed:
                return
            reason = self._judge(self._advance())
            if reason and not self._closed.is_set():
                self._end(reason)

    def _advance(self) -> float:
        """Note the main thread's progress; the seconds since the last time. A process that was suspended or could
        not run counts little of that time: nobody had a chance to make progress."""
        now = time.monotonic()
        passed = min(now - self._clock, 2 * self._tick)
        self._clock, place = now, self._place
        age = 0.0 if place is not self._place_before else self._own.age + passed
        self._place_before = place
        self._own = Beat(self._rank, *place, age=age, longest=self._longest, sequence=self._own.sequence + 1)
        return passed

    def _judge(self, passed: float) -> str:
        """Why the job hangs, or an empty string. Tells and asks the others."""
        if self._board is not None:
            try:
                self._board.publish(self._own, self._limit)
                verdict, beats = self._board.look(range(self._ranks) if self._rank == 0 else [0], self._limit)
            except NoAnswer as error:
                self._board = None
                return str(error)
            except Gone:  # the launcher, too, knows that
                self._board = None
            else:
                return verdict or self._judge_others(beats, passed)
        return self._reason("no progress", hangs.stalled_ranks({self._rank: self._own}, self._limit))

    def _judge_others(self, beats: dict[int, Beat], passed: float) -> str:
        for rank, beat in beats.items():
            same = rank in self._known and self._known[rank].sequence == beat.sequence
            self._silence[rank] = self._silence.get(rank, 0.0) + passed if same else 0.0
        self._known = beats
        reason = self._reason("no beat", hangs.silent_ranks(beats, self._silence, self._limit))
        if not reason and self._rank == 0:  # it alone sees whether somebody is in a slow phase
            reason = self._reason("no progress", hangs.stalled_ranks(beats, self._limit))
        return reason

    def _reason(self, what: str, ranks: list[int]) -> str:
        """Of the first of ``ranks``; more stands in the message."""
        if not ranks:
            return ""
        beat = self._own if ranks[0] == self._rank else self._known[ranks[0]]
        limit = self._limit if what == "no beat" else hangs.allowed(beat, self._limit)
        return f'{what} of rank {beat.rank} for {limit:.0f} s, in step {beat.step}, "{beat.phase}"'

    def _end(self, reason: str) -> None:
        """Never returns."""
        self._ends = True
        grace = 1.0 + 3 * self._tick
        faulthandler.dump_traceback_later(10 * grace, exit=True)  # should anything below hang as well
        try:
            with suppress(OSError, ValueError):
                self._last_word(reason)
            self._report(reason, grace)
        finally:
            with suppress(OSError):
                exit_codes.record(exit_codes.HUNG)
            os._exit(exit_codes.HUNG)

    def _last_word(self, reason: str) -> None:
        """To the others through the store, and to files, which remain where rank 0 does not."""
        where, collective = stacks.main_thread()
        record = stacks.flight_record()
        waits_in = stacks.pending_collective(record) or ("a collective" if collective else "")
        self._own = replace(self._own, last_word=True, where=where, waits_in=waits_in)
        if self._board is not None:
            with suppress(NoAnswer, Gone):
                self._board.condemn(reason, ANSWER)
                self._board.publish(self._own, ANSWER)
        self._folder.mkdir(parents=True, exist_ok=True)
        stacks.write_stacks(self._folder / f"rank_{self._rank:05d}.txt", self._own.to_json())
        if record:
            (self._folder / f"flight_{self._rank:05d}.json").write_bytes(record)

    def _report(self, reason: str, grace: float) -> None:
        """The first rank to come gathers, prints and writes the message; the others wait for that."""
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
        silent = [rank for rank, beat in beats.items() if not (beat.last_word or beat.left)]
        message = hangs.describe(reason, beats, silent, exit_codes.HUNG, str(self._folder))
        os.write(2, f"{message}\n".encode())  # not through sys.stderr: the main thread may hold its lock
        with suppress(OSError):
            path.write_text(message + "\n", encoding="utf-8")

    def _gather(self, deadline: float) -> dict[int, Beat]:
        """The last words of all ranks, or as many as come in time; of the others their last beat known here."""
        beats = {rank: self._known.get(rank, Beat(rank)) for rank in range(self._ranks)} | {self._rank: self._own}
        while True:
            if self._board is not None:
                try:
                    beats |= self._board.look(range(self._ranks), ANSWER)[1]
                except (NoAnswer, Gone):
                    self._board = None
            for rank, beat in beats.items():
                if not (beat.last_word or beat.left):
                    with suppress(OSError, ValueError):
                        text = (self._folder / f"rank_{rank:05d}.txt").read_text(encoding="utf-8")
                        beats[rank] = Beat.from_json(text.partition("\n")[0])
            if all(beat.last_word or beat.left for beat in beats.values()) or time.monotonic() > deadline:
                return beats
            time.sleep(0.1)
