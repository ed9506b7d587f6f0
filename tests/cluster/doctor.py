"""``mmmoe doctor`` over three simulated hosts of which the last has a fault: it is found, and that host named."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.cluster.hosts import Host, own_disk, variables
from tests.cluster.training import JOIN, SCRIPT, Run, Work, codes, expect, is_worker, until

NEEDED = {"faketime": "faketime"}
ODD = "mmm-host2"
# Under libfaketime 0.9.10 with a true monotonic clock, time.sleep of Python 3.11 fails (clock_nanosleep: EINVAL).
SLEEP = "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"


class Doctor:
    """Runs it on all hosts; ``odd`` is put before the command of the last, whose ``environment`` is its own."""

    def __init__(
        self, work: Work, made: Sequence[Host], odd: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = work.folder / "doctor.log"
        self._log.unlink(missing_ok=True)
        folder = work.folder / "doctor"
        folder.mkdir(exist_ok=True)
        command = [SCRIPT, "1", "doctor", str(work.folder / "run.yaml"), f"--run-dir={folder}", "--json",
                   "parallel.expert_parallel_size=1", "train.global_batch_size=48"]  # fmt: skip
        self.started = []
        self._began = time.monotonic()
        for host in made:
            settings = {**variables(made, host.number), "JOIN_TIMEOUT": str(JOIN), "OMP_NUM_THREADS": "1"}
            if host is made[-1]:
                command, settings = [*odd, *command], {**settings, **(environment or {})}
            self.started.append(host.start(command, self._log, **settings))

    def ended(self, code: int, hosts: int = 3) -> dict[str, list[str]]:
        """Checks that were not ok, with their result, what was seen, and the remedy."""
        expect("codes", codes(self.started[:hosts]), [code] * hosts)
        expect("within a minute and torchrun's start", time.monotonic() - self._began < 75.0, True)
        lines = self._log.read_text().splitlines()
        report = json.loads(next(line for line in lines if line.startswith("{")))
        return {
            row["check"]: [row["result"], row["seen"], row["remedy"]]
            for row in report["checks"]
            if row["result"] != "ok"
        }


def found(rows: Mapping[str, list[str]], wanted: Mapping[str, Sequence[str]]) -> None:
    """``wanted``: each check that is not ok, with its result and words of what was seen. Only the last host is
    named."""
    expect("findings", list(rows), list(wanted))
    for check, (result, *words) in wanted.items():
        expect(check, rows[check][0], result)
        for word in (ODD, *words):
            assert word in rows[check][1], f"{word!r} is not in {rows[check][1]!r}"
        assert "mmm-host1" not in rows[check][1], f"another host is named: {rows[check][1]}"
        assert rows[check][2], f"{check} has no remedy"


def nothing_is_found(work: Work, made: Sequence[Host]) -> None:
    found(without_noise(Doctor(work, made).ended(0)), {})


def without_noise(rows: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Without links that seem slow, but not broken: all hosts share this machine's cores."""
    return {check: row for check, row in rows.items() if [check, row[0]] != ["point to point", "warning"]}


def a_slow_link(work: Work, made: Sequence[Host]) -> None:
    made[2].slow(20.0)
    rows = Doctor(work, made).ended(1)
    expect("findings", list(rows), ["point to point"])
    the_last_is_the_slowest(rows)


def the_last_is_the_slowest(rows: Mapping[str, list[str]]) -> None:
    """Others may seem slow beside it: all hosts share this machine's cores."""
    result, seen, remedy = rows["point to point"]
    expect("point to point", result, "FAILED")
    assert re.match(rf"{ODD} sends \S+ [kM]B/s \(the median of all links is ", seen), seen
    assert remedy


def a_link_that_is_as_good_as_dead(work: Work, made: Sequence[Host]) -> None:
    """No collective ends over it."""
    made[2].slow(1.0)
    rows = Doctor(work, made).ended(1)
    expect("all-reduce", rows.pop("all-reduce")[:1], ["FAILED"])
    expect("all-to-all", rows.pop("all-to-all")[:1], ["not run"])
    expect("findings", list(rows), ["point to point"])
    the_last_is_the_slowest(rows)


def a_full_disk(work: Work, made: Sequence[Host]) -> None:
    rows = Doctor(work, made, own_disk(work.folder / "doctor", "64k")).ended(1)
    found(without_noise(rows), {"disk": ("FAILED", "No space left"), "shared folder": ("FAILED", "do not see")})


def another_version(work: Work, made: Sequence[Host]) -> None:
    place = work.folder / "other" / "megatron_core-9.9.9.dist-info"
    place.mkdir(parents=True, exist_ok=True)
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 9.9.9\n")
    rows = Doctor(work, made, environment={"PYTHONPATH": str(place.parent)}).ended(1)
    found(without_noise(rows), {"versions": ("FAILED", "megatron-core", "9.9.9")})


def another_time(work: Work, made: Sequence[Host]) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    place = work.folder / "sleep"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(SLEEP)
    fake = {"LD_PRELOAD": str(library), "FAKETIME": "+5s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    rows = Doctor(work, made, environment={**fake, "PYTHONPATH": str(place)}).ended(0)
    found(without_noise(rows), {"clocks": ("warning", "5 s ahead")})


def a_host_is_cut_off(work: Work, made: Sequence[Host]) -> None:
    """Before it has told its name: the others end."""
    started = Doctor(work, made)
    until(lambda: any(map(is_worker, made[2].pids)), "a worker")
    made[2].cut()
    rows = started.ended(1, hosts=2)
    expect("hosts", rows["hosts"][:1], ["FAILED"])
    assert "number 2" in rows["hosts"][1] and "rank 2" in rows["hosts"][1], rows["hosts"][1]
    expect("all-reduce", rows["all-reduce"][0], "not run")


def training_after_the_checks(work: Work, made: Sequence[Host]) -> None:
    """``train --preflight``: with the losses of one host; not at all where a check fails."""
    settings = {"JOIN_TIMEOUT": str(JOIN), "OMP_NUM_THREADS": "1"}
    for name, code, slow in (("checked", 0, False), ("refused", 1, True)):
        run = Run(work, name)
        if slow:
            made[1].slow(20.0)
        started = [
            host.start(
                [SCRIPT, "1", *run.train("--preflight")],
                run.log(host),
                **variables(made[:2], host.number),
                **settings,
            )
            for host in made[:2]
        ]
        expect("codes", codes(started), [code] * 2)
        expect("same losses", run.losses() == ([] if slow else work.straight), True)


CASES = {
    "doctor: nothing to find on three hosts": nothing_is_found,
    "doctor: a slow link": a_slow_link,
    "doctor: a link that is as good as dead": a_link_that_is_as_good_as_dead,
    "doctor: a full disk": a_full_disk,
    "doctor: another version": another_version,
    "doctor: another time": another_time,
    "doctor: a host that is cut off": a_host_is_cut_off,
    "doctor: training after the checks, or not": training_after_the_checks,
}
