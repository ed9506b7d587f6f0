"""``python -m tests.fuzz.run --cases 20000 --seed 7``: a long run over all targets.

Prints what was found, a table, and one last line of JSON. Exits 1 where a case crashed, hung, took too much
memory or ran code.

Cases run in forked children, so that a crash in C code is found and named, and the other cases still run.
A case is (target, seed, number): the same three give the same input everywhere. A child is killed by the
kernel after too much CPU time or real time (a hang inside C code never sees a Python signal handler), and
its address space is bounded. The peak memory of a case is read from the kernel.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from tests.fuzz.targets import TARGETS, Target, Workplace

CHUNK = 64  # cases a child
CPU_SECONDS = 10.0  # a case; a usual one takes some thousandths
REAL_SECONDS = 120.0  # a case; a machine may be busy with other things
GROWTH = 640 << 20  # bytes that a case may take: an image of MAX_PIXELS twice, at 4 bytes a pixel
ADDRESS_SPACE = 6 << 30  # bytes beyond what the process had: memory that is never touched costs nothing
FAULTS = ("crashed", "hung", "grown", "ran_code")
OUTCOMES = ("accepted", "skipped", "refused", *FAULTS)


@dataclass(frozen=True)
class Case:
    """What became of one input. ``detail``: the message, or where it went wrong."""

    target: str
    seed: int
    number: int
    outcome: str
    detail: str = ""

    def __str__(self) -> str:
        again = f"python -m tests.fuzz.run --target {self.target} --seed {self.seed} --only {self.number}"
        return f"{self.outcome}: {self.detail}\n  again: {again}"


def run_cases(target: Target, seed: int, numbers: Iterable[int]) -> Iterator[Case]:
    """Run every case, also if children crash."""
    waiting = list(numbers)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        place = Workplace(folder)
        target.prepare(place)
        while waiting:
            done = list(_one_child(target, place, seed, waiting[:CHUNK]))
            waiting = waiting[len(done) :]
            yield from done
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def count(cases: Sequence[Case]) -> dict[str, int]:
    """Cases by outcome; every outcome has its key."""
    found = Counter(case.outcome for case in cases)
    return {"cases": len(cases), **{name: found[name] for name in OUTCOMES}}


def _one_child(target: Target, place: Workplace, seed: int, numbers: Sequence[int]) -> Iterator[Case]:
    """The cases that one child came to; of the one in which it died, how."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        _child(target, place, seed, numbers, write)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as lines:
        cases = [Case(**json.loads(line)) for line in lines if line.endswith("\n")]
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    yield from cases
    if status and len(cases) < len(numbers):
        dead = -status if status < 0 else 0
        hung = dead in (signal.SIGPROF, signal.SIGALRM)
        detail = f"killed by {signal.Signals(dead).name}" if dead else f"exit code {status}"
        yield Case(target.name, seed, numbers[len(cases)], "hung" if hung else "crashed", detail)


def _child(target: Target, place: Workplace, seed: int, numbers: Sequence[int], write: int) -> None:
    """Never returns."""
    try:
        faulthandler.disable()
        _silence()
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        limit = status("VmSize") + ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with os.fdopen(write, "w", encoding="utf-8") as lines:
            for number in numbers:
                print(json.dumps(asdict(_case(target, place, seed, number))), file=lines, flush=True)
        os._exit(0)
    finally:
        os._exit(1)


def _case(target: Target, place: Workplace, seed: int, number: int) -> Case:
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, REAL_SECONDS)
    data = target.make(Random(f"{target.name}:{seed}:{number}"), place)
    before = reset_peak()
    try:
        outcome, detail = target.use(data, place)
    except Exception as error:  # noqa: BLE001 - which ones are allowed is what is tested
        outcome, detail = _classify(target, error)
    growth = status("VmHWM") - before
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    if growth > GROWTH:
        outcome, detail = "grown", f"{growth >> 20} MiB; {outcome}: {detail}"
    if place.marker.exists():
        outcome, detail = "ran_code", f"{place.marker.name} was written; {outcome}: {detail}"
        place.marker.unlink()
    return Case(target.name, seed, number, outcome, detail[:2000])


def _classify(target: Target, error: Exception) -> tuple[str, str]:
    message = str(error)
    if not isinstance(error, target.refusals):
        problem = type(error).__name__
    elif len(message) > 4000:
        problem = f"a message of {len(message)} characters"
    elif not any(name in message for name in target.names):
        problem = f"{type(error).__name__} that names no file"
    else:
        return "refused", message
    where = traceback.extract_tb(error.__traceback__)[-4:]
    trail = " > ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in where)
    return "crashed", f"{problem}: {message[:300]} at {trail}"


def _silence() -> None:
    """Libraries in C write to the terminal."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def reset_peak() -> int:
    """Bytes in memory now; the peak counts from here on (Linux: proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """Bytes of one line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) << 10
    raise AssertionError(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="over all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only this one; may be repeated")
    parser.add_argument("--only", type=int, help="the number of one case, run again")
    parser.add_argument("--show", action="store_true", help="print what became of every case")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    numbers = range(-(-args.cases // len(names))) if args.only is None else [args.only]
    found: list[Case] = []
    print("target".rjust(12), *(name.rjust(8) for name in ("cases", *OUTCOMES)))
    for name in names:
        cases = []
        for case in run_cases(TARGETS[name], args.seed, numbers):
            cases.append(case)
            if args.show or args.only is not None or case.outcome in FAULTS:
                print(f"{case.target} {case.number} {case}", flush=True)
        print(name.rjust(12), *(str(number).rjust(8) for number in count(cases).values()), flush=True)
        found += cases
    totals = count(found)
    print(json.dumps(totals))
    sys.exit(1 if any(totals[fault] for fault in FAULTS) else 0)


if __name__ == "__main__":
    main()
