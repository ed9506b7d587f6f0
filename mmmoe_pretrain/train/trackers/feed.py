"""Rank 0's side of the trackers: starts a process for each, and hands it the records without waiting.

A record is one datagram. If a process does not take them (a slow or dead server, a process that ended), they wait in
its queue, and then are lost: the run never waits for them.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mmmoe_pretrain.paths import python_path
from mmmoe_pretrain.train.trackers.relay import CLOSE_SECONDS

log = logging.getLogger(__name__)
BUFFER = 1 << 20  # bytes that wait where a process is stopped; its own queue holds many more
KILL_SECONDS = CLOSE_SECONDS + 15.0  # at the end of a run, until a process that still sends is killed
STOPPED_SECONDS = 5.0  # the same where a run was stopped or failed: a scheduler may not wait for long
PACKAGE = "mmmoe_pretrain.train.trackers.relay"


class Feeds:
    """The processes of ``kinds``. Made by rank 0, once the run's folder has its config."""

    def __init__(self, kinds: Sequence[str], run_dir: Path) -> None:
        self._feeds: list[_Feed] = []
        for kind in kinds:
            try:
                self._feeds.append(_Feed(kind, run_dir))
            except OSError as error:  # no room for a process
                log.warning("trackers.%s cannot start: %s; training continues without it", kind, error)

    def write(self, step: int, values: dict[str, float | None]) -> None:
        """Send a record; values that are None (not finite) are left out."""
        if not self._feeds:
            return
        known = {name: value for name, value in values.items() if value is not None}
        message = json.dumps({"step": step, "time": time.time(), "values": known}).encode()
        for feed in self._feeds:
            feed.send(message)

    def close(self, finished: bool) -> None:
        """Let the processes end, which takes a moment unless a server is gone."""
        seconds = KILL_SECONDS if finished else STOPPED_SECONDS
        deadline = time.monotonic() + seconds
        for feed in self._feeds:
            feed.end(finished)
        for feed in self._feeds:
            feed.wait(deadline)


class _Feed:
    def __init__(self, kind: str, run_dir: Path) -> None:
        self.kind, self.lost = kind, 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PACKAGE, kind, str(run_dir.absolute()), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # libraries greet there
                env={**os.environ, "PYTHONPATH": python_path()},
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # signals to the job are not for it: it ends with its socket
            )

    def send(self, message: bytes) -> None:
        try:
            self._socket.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:  # full, or closed by the end of the process
            if not self.lost:
                log.warning("trackers.%s takes no records (%s); training continues, they are lost", self.kind, error)
            self.lost += 1

    def end(self, finished: bool) -> None:
        try:
            self._socket.send(json.dumps({"finished": finished}).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            log.debug("trackers.%s is not told how the run ends", self.kind)
        self._socket.close()

    def wait(self, deadline: float) -> None:
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            log.warning("trackers.%s did not end in time and was killed: it may lack the last records", self.kind)
        if self.lost:
            log.warning("trackers.%s: %d records did not reach it; metrics.jsonl has them", self.kind, self.lost)
