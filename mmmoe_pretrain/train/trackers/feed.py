"""Rank 0's side of the trackers: starts a process for each, and hands it the records without waiting.

A record is one datagram. If a process does not take them (a slow or dead server, a stopped process), they wait in its
queue, and then are lost: the run never waits for them. A process that could not start or that ended is started again
with a later record, after growing pauses; it is told what was lost until then.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmmoe_pretrain.paths import python_path
from mmmoe_pretrain.train.trackers.relay import CLOSE_SECONDS, FOLDER, QUEUE, read_state

log = logging.getLogger(__name__)
BUFFER = 1 << 20  # bytes that wait where a process is stopped; its own queue holds many more
PAUSE, LONGEST_PAUSE = 5.0, 600.0  # seconds until a process that ended is started again
KILL_SECONDS = CLOSE_SECONDS + 15.0  # at the end of a run, until a process that still sends is killed
STOPPED_SECONDS = 5.0  # the same where a run was stopped or failed: a scheduler may not wait for long
PACKAGE = "mmmoe_pretrain.train.trackers.relay"


class Feeds:
    """The processes of ``kinds``. Made by rank 0, once the run's folder has its config."""

    def __init__(self, kinds: Sequence[str], run_dir: Path) -> None:
        self._feeds = [_Feed(kind, run_dir) for kind in kinds]

    def write(self, step: int, values: Iterable[tuple[str, float | None]]) -> None:
        """Send a record; values that are None (not finite) are left out."""
        if not self._feeds:
            return
        known = {name: value for name, value in values if value is not None}
        for feed in self._feeds:
            feed.send(step, known)

    def close(self, finished: bool) -> None:
        """Let the processes end, which takes a moment unless a server is gone."""
        seconds = KILL_SECONDS if finished else STOPPED_SECONDS
        deadline = time.monotonic() + seconds
        for feed in self._feeds:
            feed.end(finished)
        for feed in self._feeds:
            feed.wait(deadline)


class _Feed:
    """The process of one tracker, or the wait for the next one."""

    def __init__(self, kind: str, run_dir: Path) -> None:
        self.kind, self._run_dir = kind, run_dir.absolute()
        self.lost = self.failures = 0  # that the process was not told of: records, and processes before it
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._given: deque[int] = deque(maxlen=QUEUE)  # steps that the process took
        self._full = False
        self._pause, self._started = PAUSE, -LONGEST_PAUSE
        self._start()

    def send(self, step: int, values: dict[str, float]) -> None:
        if self._process is not None and self._process.poll() is not None:
            self._ended(f"its process ended with code {self._process.returncode}")
        if self._process is None and time.monotonic() >= self._started + self._pause:
            self._start()
        if self._socket is None:
            self.lost += 1
            return
        message = {"step": step, "time": time.time(), "values": values, "lost": self.lost, "failures": self.failures}
        try:
            self._socket.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:  # full, or closed by the end of the process
            if not self._full:
                log.warning("trackers.%s takes no records (%s); training continues, they are lost", self.kind, error)
            self._full = True
            self.lost += 1
        else:
            self.lost, self.failures, self._full = 0, 0, False
            self._given.append(step)

    def end(self, finished: bool) -> None:
        if self._socket is None:
            return
        message = {"finished": finished, "lost": self.lost, "failures": self.failures}
        try:
            self._socket.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            log.debug("trackers.%s is not told how the run ends", self.kind)
        else:
            self.lost = self.failures = 0
        self._socket.close()

    def wait(self, deadline: float) -> None:
        if self._process is not None:
            try:
                self._process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
                log.warning("trackers.%s did not end in time and was killed: it may lack the last records", self.kind)
            if self._process.returncode:  # it did not tell what it lost
                self.lost += self._unsent()
        if self.lost:
            log.warning("trackers.%s: %d records did not reach it; metrics.jsonl has them", self.kind, self.lost)

    def _start(self) -> None:
        now = time.monotonic()
        lived, self._started = now - self._started, now
        self._pause = PAUSE if lived > LONGEST_PAUSE else min(2 * self._pause, LONGEST_PAUSE)
        try:
            self._spawn()
        except OSError as error:  # no room for a process
            self._ended(f"its process cannot start: {error}")

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self._socket = ours
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PACKAGE, self.kind, str(self._run_dir), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # libraries greet there
                env={**os.environ, "PYTHONPATH": python_path()},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # signals to the job are not for it: it ends with its socket
            )

    def _ended(self, reason: str) -> None:
        """There is no process: wait for the next one."""
        self.lost += self._unsent()
        self.failures += 1
        self._given.clear()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None
        told = "trackers.%s: %s; training continues, and a record after %.0f s starts another"
        wait = max(0.0, self._started + self._pause - time.monotonic())
        log.warning(told, self.kind, reason, wait)

    def _unsent(self) -> int:
        """Records that the process took and the tracker does not have."""
        has = read_state(self._run_dir / FOLDER / f"{self.kind}.json").step if self._given else 0
        return sum(step > has for step in self._given)
