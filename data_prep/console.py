"""How every command answers: lines and tables on stdout, JSON, exit codes, and its end by a signal or a closed pipe.

Exit codes: 0 done, 1 problems found (``verify``), 2 bad input or usage, 130 after Ctrl-C, 143 after SIGTERM, 141
where the reader of stdout ended first. A defect of this package prints its traceback and exits with 1.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import typer
from rich.console import Console

PROBLEMS, USER_ERROR, CLOSED_PIPE = 1, 2, 128 + signal.SIGPIPE
SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
MIN_WIDTH = 110  # whole names in a log, too
TWICE_SECONDS = 1.0  # `timeout` sends each signal twice at once
_IN_C = "in C code"  # how the name of a thread begins
T = TypeVar("T")


class Interrupted(BaseException):
    """A signal ended the command. Its notes say what was kept (``kept``)."""


class ClosedPipe(BaseException):
    """Nobody reads stdout any more."""


@contextlib.contextmanager
def kept(note: str) -> Iterator[None]:
    """``note``: what a user is told where a signal ends the block: what was kept, and how to go on."""
    try:
        yield
    except Interrupted as error:
        error.add_note(note)
        raise


class _Output(Console):
    def on_broken_pipe(self) -> None:
        raise ClosedPipe


def stdout() -> Console:
    """For tables: no markup, so that names are shown as they are."""
    console = _Output(markup=False, highlight=False)
    console.width = max(console.width, MIN_WIDTH)
    return console


def say(line: str) -> None:
    """A line on stdout, which may hold names that others chose."""
    stdout().print(printable(line), soft_wrap=True)


def printable(text: str, keep: str = "") -> str:
    """The text with what could steer a terminal, or turn its direction, as escapes; ``keep``: letters that stay."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def say_json(value: dict[str, Any]) -> None:
    """The one JSON object that ``--json`` writes to stdout, in ASCII."""
    try:
        print(json.dumps(value, allow_nan=False), flush=True)
    except BrokenPipeError:
        raise ClosedPipe from None


def answer(as_json: bool, value: dict[str, Any], *lines: str) -> None:
    """What a command answers: ``value`` with ``--json``, else ``lines``."""
    if as_json:
        say_json(value)
        return
    for line in lines:
        say(line)


def answering(work: Callable[[], T]) -> T:
    """``work``, which may be long in C code, in a thread: Python answers signals between steps of this one alone."""
    pool = ThreadPoolExecutor(1, _IN_C)
    try:
        return pool.submit(work).result()
    finally:
        pool.shutdown(wait=False)


class _Stderr:
    """What stderr is now: while a bar of progress is shown, it prints above the bar. Lines may hold names that others
    chose."""

    def write(self, text: str) -> int:
        return sys.stderr.write(printable(text, keep="\n"))

    def flush(self) -> None:
        sys.stderr.flush()


def run(app: typer.Typer, name: str) -> None:
    """Run the command of ``sys.argv`` and exit. An error that a user can fix is one line on stderr."""
    logging.basicConfig(level=logging.WARNING, stream=_Stderr(), format="%(levelname)s %(message)s")
    with _signals() as received:
        code = _run(app, name, received)
    if received and any(thread.name.startswith(_IN_C) for thread in threading.enumerate()):
        sys.stderr.flush()
        os._exit(128 + received[0])  # C++ aborts where it is ended in the midst of its work
    sys.exit(code)


def _run(app: typer.Typer, name: str, received: list[int]) -> int | str | None:
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        return end.code
    except (ClosedPipe, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at its end
        return CLOSED_PIPE
    except (Interrupted, ValueError, OSError) as error:
        if not received:
            print(printable(f"{name}: {_told(error)}", keep="\n"), file=sys.stderr)
            return USER_ERROR
        notes = getattr(error, "__notes__", ["repeat the command"])
        print(f"{name}: {'; '.join([SIGNALS[signal.Signals(received[0])], *notes])}", file=sys.stderr)
        return 128 + received[0]
    return 0


def _told(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        remedy = "; correct the path" * isinstance(error, FileNotFoundError)
        return f"{os.fsdecode(error.filename)}: {error.strerror}{remedy}"
    return str(error)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM raise ``Interrupted`` once, and end the process where one comes again. The numbers of those
    that came."""
    received: list[int] = []
    first = 0.0

    def handle(number: int, _: object) -> None:
        nonlocal first
        if received and time.monotonic() - first > TWICE_SECONDS:
            os._exit(128 + number)
        if not received:
            first = time.monotonic()
            received.append(number)
            raise Interrupted

    before = {number: signal.getsignal(number) for number in SIGNALS}
    mine = [number for number in SIGNALS if before[number] is not signal.SIG_IGN]  # as of `nohup`
    for number in mine:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number in mine:
            signal.signal(number, before[number])
