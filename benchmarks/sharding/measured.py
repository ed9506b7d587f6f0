"""What a command takes: CPU seconds, seconds of the clock, and the peak memory of each of its processes."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_LONGEST_SECONDS = 1800.0
_EVERY_SECONDS = 0.2


@dataclass
class Used:
    """``cpu``: of the command and the processes that it waited for. ``peaks``: MB by process, the command first; the
    last fifth of a second of each may be missing."""

    cpu: float
    seconds: float
    peaks: list[float] = field(default_factory=list)


def measure(command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Used:
    """Run it; what it prints goes to ``log``. Raises RuntimeError where it fails or takes too long."""
    peaks: dict[int, float] = {}
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(environment or {})}
    began = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=variables
        )
    alarm = threading.Timer(_LONGEST_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
    alarm.start()
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks), daemon=True)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    alarm.cancel()
    seconds = time.perf_counter() - began
    watcher.join(_LONGEST_SECONDS)
    if process.returncode:
        said = log.read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"{Path(command[0]).name} ended with {process.returncode}: {' '.join(said[-2:])}")
    own = peaks.pop(process.pid, 0.0)
    return Used(usage.ru_utime + usage.ru_stime, seconds, [own, *sorted(peaks.values(), reverse=True)])


def _watch(root: int, peaks: dict[int, float]) -> None:
    """Note the peak of each process until the command ends."""
    while Path(f"/proc/{root}/task/{root}/children").exists():
        for process in _family(root):
            try:
                lines = Path(f"/proc/{process}/status").read_text().splitlines()
            except OSError:  # it has ended
                continue
            peak = next((line for line in lines if line.startswith("VmHWM")), None)  # a zombie has none
            if peak:
                peaks[process] = int(peak.split()[1]) / 1024
        time.sleep(_EVERY_SECONDS)


def _family(root: int) -> Iterator[int]:
    """A process and its living descendants."""
    yield root
    try:
        children = Path(f"/proc/{root}/task/{root}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _family(int(child))
