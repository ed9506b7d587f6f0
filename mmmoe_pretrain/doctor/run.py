"""All checks, one after the other, on all ranks: each measures within its limit and tells rank 0, which judges.

No rank can make the others wait for long: a rank that does not answer in time is named, and left out from then on.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from mmmoe_pretrain import exit_codes
from mmmoe_pretrain.doctor import clock, folder, gpus, limits, network, run_config, traffic, versions
from mmmoe_pretrain.doctor.peer import Peer, Subject, join, limited
from mmmoe_pretrain.doctor.result import Problem, Reports, Result, Verdict, as_json, names, table

SECONDS = 58.0  # for all checks; those of which it leaves no time are not run
MARGIN = 2.0  # seconds more that rank 0 waits for the others
SILENT = "see that host's log, and whether its processes run and reach rank 0 (firewall, MASTER_ADDR)"
SLOW = "see what that host's processes wait for (dmesg, ps -eo stat,wchan,args): a driver, a disk or a file system"
ERROR = "correct that on the host named, or leave it out"
STUCK = "see the hosts named; NCCL_DEBUG=INFO or TORCH_CPP_LOG_LEVEL=INFO tells which addresses are tried"


@dataclass(frozen=True)
class Check:
    """``needs``: a config, a run folder, or all ranks, which then take part; else one rank of each host does."""

    name: str
    measure: Callable[[Peer], Any]
    judge: Callable[[Reports], Verdict]
    seconds: float = 10.0
    needs: str = ""


ALL = "all ranks"
CHECKS = (
    Check("versions", versions.measure, versions.judge),
    Check("GPUs", gpus.measure, gpus.judge),
    Check("shared memory", limits.shared_memory, limits.judge_shared_memory),
    Check("open files", limits.open_files, limits.judge_open_files),
    Check("locked memory", limits.locked_memory, limits.judge_locked_memory),
    Check("clocks", clock.measure, clock.judge),
    Check("layout", run_config.layout, run_config.judge_layout, needs="CONFIG"),
    Check("data", run_config.data, run_config.judge_data, needs="CONFIG"),
    Check("disk", folder.disk, folder.judge_disk, needs="CONFIG or --run-dir"),
    Check("shared folder", folder.shared, folder.judge_shared, 12.0, needs="CONFIG or --run-dir"),
    Check("process group", network.connect, traffic.judge_backend, 15.0, needs=ALL),
    Check("point to point", network.point_to_point, traffic.judge_links, 15.0, needs=ALL),
    Check("all-reduce", network.all_reduce, traffic.judge_collective, 12.0, needs=ALL),
    Check("all-to-all", network.all_to_all, traffic.judge_collective, 12.0, needs=ALL),
)


@dataclass
class Examination:
    """``broken``: the first check of all ranks that did not work."""

    peer: Peer
    deadline: float
    broken: str = ""
    stuck: bool = False  # a thread of this process has not ended
    results: list[Result] = field(default_factory=list)

    def run(self, checks: Sequence[Check]) -> int:
        """The exit code, on every rank."""
        peer = self.peer
        for number, check in enumerate(checks):
            if peer.rank == 0:
                left = self.deadline - time.monotonic() - MARGIN
                seconds = 0.0 if self._obstacle(check, left) else min(check.seconds, left)
                peer.channel.say(f"go/{number}", seconds)
            else:
                seconds = peer.channel.hear(f"go/{number}", SECONDS)
            if seconds:
                self._take_part(number, check, seconds)
        if peer.rank == 0:
            failed = any(result.result == "FAILED" for result in self.results)
            peer.channel.say("end", [exit_codes.FAULT if failed else exit_codes.DONE, sorted(peer.lost)])
        code, lost = peer.channel.hear("end", SECONDS)
        peer.lost = set(lost)
        self._leave()
        return int(code)

    def _obstacle(self, check: Check, left: float) -> bool:
        """Adds the row of a check that cannot run."""
        peer, why = self.peer, ""
        if check.needs == ALL and peer.lost:
            why = f"{peer.hosts_of(peer.lost)} did not answer"
        elif check.needs == ALL and self.broken:
            why = f"after {self.broken}"
        elif check.needs == "CONFIG" and peer.subject.config is None:
            why = "no CONFIG"
        elif check.needs.endswith("--run-dir") and not peer.has_run_dir:
            why = "neither CONFIG nor --run-dir" if peer.subject.config is None else "CONFIG could not be read"
        elif left < 1.0:
            why = f"{SECONDS:.0f} s are over"
        if why:
            self.results.append(Result(check.name, "not run", why))
        return bool(why)

    def _take_part(self, number: int, check: Check, seconds: float) -> None:
        peer = self.peer
        ranks = range(peer.world) if check.needs == ALL else peer.leaders
        deadline = time.monotonic() + seconds + MARGIN
        if peer.rank in ranks:
            report = self._measure(check, seconds)
            peer.channel.say(f"report/{number}/{peer.rank}", report)
        if peer.rank == 0:
            asked = {f"report/{number}/{rank}": rank for rank in ranks if rank not in peer.lost}
            found = peer.channel.gather(asked, deadline - time.monotonic())
            silent = {rank for key, rank in asked.items() if key not in found}
            by_name = self._by_name(check, {asked[key]: report for key, report in found.items()})
            self.results.append(judged(check, by_name, peer.hosts_of(silent), seconds))
            peer.lost |= silent
            if check.needs == ALL and (silent or any("value" not in report for report in by_name.values())):
                self.broken = self.broken or check.name

    def _measure(self, check: Check, seconds: float) -> dict[str, Any]:
        """{"value": ...}, {"error": ...} or, out of time, {"late": what it waited for, "partial": ...}."""
        self.peer.stage, self.peer.partial = "", None
        try:
            return {"value": limited(seconds, lambda: check.measure(self.peer))}
        except TimeoutError as error:
            self.stuck = True
            partial = {} if self.peer.partial is None else {"partial": deepcopy(self.peer.partial)}
            return {"late": self.peer.stage, "error": str(error), **partial}
        except Exception as error:  # noqa: BLE001 - no defect of one check may end the others
            return {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"}

    def _by_name(self, check: Check, reports: Mapping[int, Any]) -> dict[str, Any]:
        peer = self.peer
        if check.needs == ALL:
            return {peer.labels[rank]: report for rank, report in sorted(reports.items())}
        return {name: reports[ranks[0]] for name, ranks in peer.hosts.items() if ranks[0] in reports}

    def _leave(self) -> None:
        """The process group ends; rank 0 stays until the others have heard it."""
        peer = self.peer
        if not self.stuck and dist.is_initialized():
            try:
                limited(5.0, peer.group.close)
            except (TimeoutError, RuntimeError):
                self.stuck = True
        with suppress(TimeoutError, RuntimeError):
            peer.channel.say(f"left/{peer.rank}", True)
            if peer.rank == 0:
                peer.channel.gather((f"left/{rank}" for rank in range(peer.world) if rank not in peer.lost), 3.0)


def judged(check: Check, reports: Mapping[str, Any], silent: str, seconds: float) -> Result:
    """The row of a check, from what each host (or rank) measured. ``silent``: those that did not answer."""
    problems = []
    if silent:
        problems.append(Problem("FAILED", f"{silent} did not answer within {seconds + MARGIN:.0f} s", SILENT))
    late = {name: report["late"] for name, report in reports.items() if "late" in report}
    behind = [name for name, stage in late.items() if not stage]  # the others wait for these
    if behind:
        remedy = STUCK if check.needs == ALL else SLOW
        problems.append(Problem("FAILED", f"{names(behind)} did not end it within {seconds:.0f} s", remedy))
    elif late and not silent:
        waits = names(f"{name} {stage}" for name, stage in late.items())
        problems.append(Problem("FAILED", f"not done within {seconds:.0f} s: {waits}", STUCK))
    for name, report in reports.items():
        if "error" in report and "late" not in report:
            problems.append(Problem("FAILED", f"{name}: {report['error']}", STUCK if check.needs == ALL else ERROR))
    good = {name: report[key] for name, report in reports.items() for key in ("value", "partial") if key in report}
    verdict = check.judge(good) if good else Verdict("")
    return Result.of(check.name, Verdict(verdict.seen, [*problems, *verdict.problems]))


def examine(subject: Subject, json_: bool = False) -> Peer:
    """Runs all checks on the ranks of this job, and prints the table on rank 0. Ends the process where a check
    failed, on every rank.

    Keep the result while a process group is made after it: another rank may have asked the store of rank 0 for it
    already, which ends with rank 0's Peer.
    """
    began = time.monotonic()
    guard = threading.Timer(SECONDS + 2 * MARGIN, _give_up)
    guard.daemon = True
    guard.start()
    work, code = None, exit_codes.FAULT
    try:
        peer = join(subject)
        work = Examination(peer, began + SECONDS)
        work.results.append(hosts_result(peer))
        code = work.run(CHECKS)
        if peer.rank == 0:
            _print(work, code, time.monotonic() - began, json_)
    except (TimeoutError, dist.DistError) as error:
        where = os.environ.get("MASTER_ADDR", "this machine")
        _say(f"no answer from rank 0 at {where}: {str(error).partition(chr(10))[0][:200]}")
    guard.cancel()
    if work is not None and code == exit_codes.DONE:
        return work.peer
    # Where hosts are lost, torchrun would wait for theirs after ranks that end well.
    code = exit_codes.record(code, final=work is not None and not work.peer.lost)
    sys.stdout.flush()
    sys.stderr.flush()
    if work is None or work.stuck:
        os._exit(code)
    sys.exit(code)


def hosts_result(peer: Peer) -> Result:
    seen = f"{len(peer.hosts)} with {peer.world} rank{'s' * (peer.world > 1)}: {names(peer.hosts)}"
    lost = sorted(peer.lost)
    told = f"{peer.hosts_of(lost)} did not answer (rank{'s' * (len(lost) > 1)} {names(map(str, lost))})"
    return Result.of("hosts", Verdict(seen, [Problem("FAILED", told, SILENT)] if lost else []))


def _print(work: Examination, code: int, seconds: float, json_: bool) -> None:
    if json_:
        hosts = list(work.peer.hosts)
        print(as_json(work.results, exit_code=code, hosts=hosts, ranks=work.peer.world, seconds=round(seconds, 1)))
        return
    count = {level: sum(result.result == level for result in work.results) for level in ("FAILED", "warning")}
    print(table(work.results))
    print(f"{count['FAILED']} failed, {count['warning']} warnings, {seconds:.0f} s", flush=True)


def _say(text: str) -> None:
    print(f"mmmoe doctor: rank {os.environ.get('RANK', '0')}: {text}", file=sys.stderr, flush=True)


def _give_up() -> None:
    """No check has a limit inside torch's store, whose client waits for good where rank 0's machine is cut off."""
    _say("no answer from rank 0's store; its host has failed or is cut off")
    os._exit(exit_codes.record(exit_codes.FAULT))
