"""Requests to stop: the run finishes its step, saves a checkpoint and ends.

SIGTERM (of schedulers and Kubernetes), SIGUSR1 (Slurm's warning) and a first SIGINT (Ctrl-C) only set a flag,
also in the middle of a save. A second SIGINT interrupts at once. Under ``launch/torchrun.sh`` the request
comes as a file, named in MMMOE_STOP_FILE, which also reaches workers that are still starting.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mmmoe_pretrain.exit_codes import STOP_FILE

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """Whether this process should stop, and why: ``reason`` is the name of a signal, or empty."""

    def __init__(self, stop_file: Path | None = None) -> None:
        self._stop_file = stop_file
        self._reason = ""

    @property
    def reason(self) -> str:
        if not self._reason and self._stop_file is not None and self._stop_file.exists():
            # The launcher writes there which signal it got. The file is empty for a moment, before it is written.
            self._reason = self._stop_file.read_text(encoding="ascii").strip()
        return self._reason

    @property
    def requested(self) -> bool:
        return bool(self.reason)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. It may run between any two instructions, so it does little."""
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self._reason = self._reason or signal.Signals(number).name
        if number == signal.SIGINT:  # from a terminal; print is not safe here
            os.write(2, b"\nsaving after this step, then ending; interrupt again to end at once\n")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, signals set the request's flag; the earlier handlers are restored afterwards.

    Python allows handlers only in the main thread; in others only the file counts.
    """
    path = os.environ.get(STOP_FILE)
    request = StopRequest(Path(path) if path else None)
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, request.on_signal) for number in STOPPING}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
