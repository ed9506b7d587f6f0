"""The process of one tracker: ``python -m mmmoe_pretrain.train.trackers.relay KIND RUN SOCKET``.

It takes records from rank 0 at once, sends them in order, and tries again where that fails, with growing pauses. It
keeps the id of the tracker's run and the last step there in RUN/trackers/KIND.json. A step that the tracker has is
not sent again: of steps that a run repeats after a restart or a rollback, the tracker keeps the first values.
Imports no torch.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmmoe_pretrain.train.journal import replacing
from mmmoe_pretrain.train.trackers.kinds import KINDS, Kind, Line, Subject, Tracker
from mmmoe_pretrain.untrusted import read_json, read_yaml
from mmmoe_pretrain.urls import redacted

log = logging.getLogger("mmmoe_pretrain.train.trackers")
FOLDER = "trackers"  # in the run's folder
QUEUE = 10_000  # records that wait for a server; older ones are lost first
PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds until a failed line is sent again
WRITE_SECONDS = 1.0  # between two writes of the state, while many records are sent
CLOSE_SECONDS = 10.0  # to send what is left after the end of the run
CLOSED_SECONDS = 30.0  # from then on a library that does not return is ended
MESSAGE = 1 << 21  # bytes of the largest datagram


@dataclass
class State:
    """RUN/trackers/KIND.json."""

    id: str = ""
    step: int = 0  # the last one that the tracker has
    sent: int = 0  # records, over all starts
    lost: int = 0
    failures: int = 0  # processes of this tracker that could not start, or ended before the run
    error: str = ""  # why the last attempt failed; empty where it did not

    def write(self, path: Path) -> None:
        with replacing(path) as draft:
            draft.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_state(path: Path) -> State:
    """A new one where there is none, or a file that is damaged."""
    try:
        value = read_json(path) if path.is_file() else {}
        return State(**value)
    except (ValueError, TypeError) as error:
        log.warning("%s is damaged (%s): the tracker begins a new run", path, error)
        return State()


class Inbox:
    """What has come from rank 0, taken by a thread as it comes."""

    def __init__(self, own: socket.socket) -> None:
        self._socket = own
        self._lines: deque[Line] = deque()
        self._changed = threading.Condition()
        self.ended = self.finished = False
        self.dropped = self.failures = 0  # records, and processes before this one, that the state does not count yet
        threading.Thread(target=self._read, daemon=True).start()

    def take(self, seconds: float | None) -> list[Line]:
        """The lines so far; waits for some, for the end or for ``seconds`` (None: as long as it takes)."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self.ended, seconds)
            lines = list(self._lines)
            self._lines.clear()
            return lines

    def _read(self) -> None:
        while message := self._socket.recv(MESSAGE):
            value = json.loads(message)
            with self._changed:
                self.dropped += value.pop("lost", 0)
                self.failures += value.pop("failures", 0)
                if "finished" in value:
                    self.finished = value["finished"]
                    continue
                if len(self._lines) == QUEUE:
                    self._lines.popleft()
                    self.dropped += 1
                self._lines.append(Line(**value))
                self._changed.notify()
        signal.setitimer(signal.ITIMER_REAL, CLOSED_SECONDS)
        with self._changed:
            self.ended = True
            self._changed.notify()


class Relay:
    """Sends what ``inbox`` holds, to the end."""

    def __init__(self, name: str, connect: Callable[[State], Tracker], inbox: Inbox, path: Path) -> None:
        self._name, self._connect, self._inbox, self._path = name, connect, inbox, path
        self._state = read_state(path)
        self._lost_before = self._state.lost
        self._tracker: Tracker | None = None
        self._pending: deque[Line] = deque()
        self._last = self._state.step  # step that is sent or waits
        self._pause = PAUSE
        self._unwritten = False  # the last attempt to write the state failed
        self._next_attempt = self._written = -math.inf

    def run(self) -> None:
        deadline = math.inf
        while True:
            ended, now = self._inbox.ended, time.monotonic()  # in this order: then ``take`` gets all that came
            deadline = min(deadline, now + CLOSE_SECONDS) if ended else deadline
            self._accept(self._inbox.take(max(0.0, self._next_attempt - now) if self._pending else None))
            if ended and self._pending and not self._send():
                time.sleep(PAUSE)
            elif self._pending and time.monotonic() >= self._next_attempt:
                self._send()
            if ended and (not self._pending or time.monotonic() > deadline):
                break
        self._close()

    def _accept(self, lines: list[Line]) -> None:
        for line in lines:
            if line.step > self._last:
                self._pending.append(line)
                self._last = line.step
        while len(self._pending) > QUEUE:
            self._pending.popleft()
            self._state.lost += 1
        self._state.lost += self._inbox.dropped
        self._state.failures += self._inbox.failures
        self._inbox.dropped = self._inbox.failures = 0

    def _send(self) -> bool:
        """Send what waits; whether all of it arrived."""
        state = self._state
        try:
            if self._tracker is None:
                self._tracker = self._connect(state)
                state.id = self._tracker.id
                state.write(self._path)  # before a line: a restart must find the run
            while self._pending:
                self._tracker.log(self._pending[0])
                line = self._pending.popleft()
                state.step, state.sent = line.step, state.sent + 1
                if time.monotonic() > self._written + WRITE_SECONDS:
                    self._write_state()
        except Exception as error:  # noqa: BLE001 - each library and server has its own
            self._failed(error)
        else:
            if state.error:
                log.warning("trackers.%s: records arrive again, up to step %d", self._name, state.step)
            state.error, self._pause, self._next_attempt = "", PAUSE, -math.inf
        self._write_state()
        return not self._pending

    def _failed(self, error: Exception) -> None:
        reason = redacted(" ".join(f"{type(error).__name__}: {error}".split()))[:300]
        if not self._state.error:
            told = "trackers.%s fails (%s); training continues, and up to %d records wait for it"
            log.warning(told, self._name, reason, QUEUE)
        self._state.error = reason
        self._next_attempt = time.monotonic() + self._pause
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _close(self) -> None:
        state = self._state
        state.lost += len(self._pending)
        if state.lost > self._lost_before:
            lost = state.lost - self._lost_before
            log.warning("trackers.%s: %d records are lost; metrics.jsonl has them", self._name, lost)
        self._write_state()
        try:
            if self._tracker is not None:
                self._tracker.close(self._inbox.finished)
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("trackers.%s did not end its run: %s", self._name, str(error)[:300])

    def _write_state(self) -> None:
        self._written = time.monotonic()
        try:
            self._state.write(self._path)
        except OSError as error:
            if not self._unwritten:
                log.warning("cannot write %s: %s; a restart sends some steps again", self._path, error)
            self._unwritten = True
        else:
            self._unwritten = False


def relay(kind: Kind, name: str, run_dir: Path, own: socket.socket) -> None:
    """Serve one tracker until ``own`` is closed."""
    folder = run_dir / FOLDER
    folder.mkdir(exist_ok=True)
    config: dict[str, Any] = read_yaml(run_dir / "config.yaml")

    def connect(state: State) -> Tracker:
        settings = config["trackers"][name] or {}
        return kind.make(Subject(config["name"], folder, settings, config, state.id, uuid.uuid4().hex[:8]))

    inbox = Inbox(own)
    with (folder / f"{name}.lock").open("w") as lock:
        with suppress(OSError):  # no locks on this file system
            fcntl.flock(lock, fcntl.LOCK_EX)  # of an earlier start, which may still send
        Relay(name, connect, inbox, folder / f"{name}.json").run()


def main() -> None:
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)  # rank 0 decides when the run ends
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    name, run_dir, number = sys.argv[1:]
    code = 0
    try:
        relay(KINDS[name], name, Path(run_dir), socket.socket(fileno=int(number)))
    except (OSError, ValueError) as error:  # a full disk, or a config that is gone
        log.error("trackers.%s cannot start: %s; training continues, and it is tried again", name, error)
        code = 1
    os._exit(code)  # no exit handler of a library may keep the process


if __name__ == "__main__":
    main()
