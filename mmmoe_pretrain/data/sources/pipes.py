"""Bytes that are read once and in order: the output of a command (``pipe:``), or a file that is not read by ranges.

A command runs in a session of its own. Its guard, a shell that waits for the end of a pipe that only this process
holds open, kills all of that session's processes when the stream is closed or this process ends, however it ends.
"""

from __future__ import annotations

import bz2
import contextlib
import fcntl
import gzip
import io
import lzma
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from mmmoe_pretrain.data.storage.files import Files, StorageError
from mmmoe_pretrain.data.storage.retry import TransientError
from mmmoe_pretrain.urls import redacted_command

PIPE = "pipe:"
CHUNK = 1 << 20
MAX_STDERR = 4096  # bytes at its end that are searched for the last line
OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
CLOSED_EARLY = (141, -13)  # SIGPIPE: the reader of a pipeline wanted no more
NOT_A_COMMAND = (126, 127)  # of a shell: it cannot be run, is not found
_KILL_SECONDS = 5.0  # a killed process may be stuck in the kernel, on a dead network disk: it is left there
# KILL: a data worker ignores SIGTERM, and so do the processes that it starts.
_GUARDED = """exec 3<&0 </dev/null
(read -r _ <&3; kill -KILL 0) >/dev/null 2>&1 &
guard=$!
sh -c "$1" 3<&-
code=$?
kill -KILL $guard 2>/dev/null
wait $guard 2>/dev/null
exit $code"""


def open_once(url: str, files: Files) -> tuple[BinaryIO, BinaryIO]:
    """The bytes of ``url``, decompressed where they are gzip, bzip2 or xz, and what to close after it.

    Reading raises TransientError where a command fails, or gives no byte within the time limit of ``files``.
    """
    if url.startswith(PIPE):
        output = _Output(url.removeprefix(PIPE), files.settings.retries.request_seconds)
        raw = cast(BinaryIO, io.BufferedReader(output, CHUNK))
    else:
        raw = files.stream(url)
    try:
        first = cast(io.BufferedReader, raw).peek(6)[:6]
    except BaseException:
        raw.close()
        raise
    opener = next((its for magic, its in OPENERS.items() if first.startswith(magic)), None)
    return (opener(raw) if opener else raw), raw


class _Output(io.RawIOBase):
    """The standard output of a shell command."""

    def __init__(self, command: str, seconds: float) -> None:
        """``seconds``: the longest wait for the next byte."""
        self._shown, self._seconds, self._pid = redacted_command(PIPE + command), seconds, os.getpid()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        held, self._guard = os.pipe()
        try:
            self._process = subprocess.Popen(
                ["sh", "-c", _GUARDED, "sh", command], stdin=held, stdout=subprocess.PIPE, stderr=self._errors,
                bufsize=0, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            os.close(self._guard)
            self._errors.close()
            raise TransientError(f"{self._shown} cannot be started: {error.strerror}") from None
        finally:
            os.close(held)
        assert self._process.stdout is not None
        self._output = self._process.stdout
        with contextlib.suppress(OSError):  # a user may have few large ones
            fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, CHUNK)
        self._poll = select.poll()
        self._poll.register(self._output, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if not self._poll.poll(1000 * self._seconds):
            raise TransientError(f"no byte in {self._seconds:.3g} s{self._last_line()}")
        count = os.readv(self._output.fileno(), [buffer])
        if not count:
            self._check_exit()
        return count

    def close(self) -> None:
        """End the command with all of its processes."""
        if self.closed:
            return
        super().close()
        if getattr(self, "_output", None) is None:  # it was not started
            return
        if os.getpid() == self._pid and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_SECONDS)
        os.close(self._guard)
        self._output.close()
        self._errors.close()

    def _check_exit(self) -> None:
        try:
            code = self._process.wait(self._seconds)
        except subprocess.TimeoutExpired:
            raise TransientError(f"it closed its output and did not end in {self._seconds:.3g} s") from None
        if code in NOT_A_COMMAND:
            raise StorageError(
                f"{self._shown} cannot be run (exit code {code}){self._last_line()}; correct data.train"
            )
        if code and code not in CLOSED_EARLY:
            raise TransientError(f"exit code {code}{self._last_line()}")

    def _last_line(self) -> str:
        """Of what the command wrote to stderr."""
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - MAX_STDERR))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {redacted_command(lines[-1][:300])}" if lines else ""
