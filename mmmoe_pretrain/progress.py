"""Progress on stderr of operations that take more than two seconds: a bar on a terminal, else a line every ten
seconds.

Of the ranks of a job, only rank 0 prints it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

QUIET_SECONDS = 2.0
LINE_SECONDS = 10.0  # between two plain lines
BAR_SECONDS = 0.25
IDLE_SECONDS = 5.0

T = TypeVar("T")


def counted(count: int, noun: str, ending: str = "s") -> str:
    """``1 row``, ``2,000 rows``."""
    return f"{count:,} {noun}{ending * (count != 1)}"


class Progress:
    """Prints what is done of ``total`` (None: unknown), its rate and the time left, from ``with`` to its end.

    ``scale`` is what one ``unit`` is made of: ``Progress("a.tar", size, "MB", scale=10**6)``. ``waits_for`` is told
    where nothing has been done for five seconds.
    """

    def __init__(
        self, what: str, total: float | None = None, unit: str = "", *, scale: int = 1, waits_for: str = ""
    ) -> None:
        self.what, self._unit, self._scale, self._waits_for = what, unit, scale, waits_for
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)
        self.restart(0, total)

    def restart(self, done: float, total: float | None) -> None:
        """Start again at ``done``, which does not count for the rate."""
        self.done, self.total, self._first, self._begun = done, total, done, time.monotonic()
        self._advanced = self._begun

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def advance(self, count: float = 1) -> None:
        self.done += count
        self._advanced = time.monotonic()

    def text(self) -> str:
        """``sharding: 3,200 of 100,000 samples, 412 a second, 3:55 left``."""
        now = time.monotonic()
        seconds, idle = max(now - self._begun, 1e-9), now - self._advanced
        waiting = (
            f"; for {clock(idle)} waiting for {self._waits_for}" if self._waits_for and idle > IDLE_SECONDS else ""
        )
        rate = (self.done - self._first) / seconds
        if not self._unit or rate <= 0:
            return f"{self.what}: {clock(seconds)} so far{waiting}"
        total = f" of {self._amount(self.total)}" if self.total else ""
        left = f", {clock(max(self.total - self.done, 0) / rate)} left" if self.total else ""
        done = f"{self._amount(self.done)}{total} {self._unit}"
        return f"{self.what}: {done}, {self._amount(rate)} a second{left}{waiting}"

    def _amount(self, value: float) -> str:
        scaled = value / self._scale
        return f"{scaled:,.0f}" if self._scale == 1 and scaled >= 10 else f"{scaled:,.1f}".removesuffix(".0")

    def _show(self) -> None:
        if self._ended.wait(QUIET_SECONDS) or os.environ.get("RANK", "0") != "0":
            return
        if sys.stdout.isatty() and sys.stderr.isatty():
            with Bar(
                BarColumn(), TextColumn("{task.description}"), console=Console(stderr=True), transient=True
            ) as bar:
                task = bar.add_task(self.text())
                while not self._ended.wait(BAR_SECONDS):
                    bar.update(task, description=self.text(), completed=self.done, total=self.total)
        else:
            print(self.text(), file=sys.stderr, flush=True)
            while not self._ended.wait(LINE_SECONDS):
                print(self.text(), file=sys.stderr, flush=True)


def track(items: Iterable[T], what: str, total: int | None, unit: str) -> Iterator[T]:
    """``items``, with progress as they are taken."""
    with Progress(what, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()


def clock(seconds: float) -> str:
    """200 -> ``3:20``, 3725 -> ``1:02:05``."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
