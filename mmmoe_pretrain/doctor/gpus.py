"""The GPUs of each host, by nvidia-smi: their number, clocks, throttling and memory errors."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Any

import torch

from mmmoe_pretrain.doctor.peer import Peer
from mmmoe_pretrain.doctor.result import Problem, Reports, Verdict, mismatch, names
from mmmoe_pretrain.parallel.runtime import sees_one_gpu

FIELDS = "index,name,clocks.max.sm,clocks_{}_reasons.active,ecc.errors.uncorrected.volatile.total"
NAMES = ("event", "throttle")  # of the reasons: by drivers from 535 on, and before
SECONDS = 4.0
MOST_GPUS = 64
# NVML's nvmlClocksThrottleReasons; idle, user settings and the power cap of full load are no faults.
THROTTLED = {0x08: "hardware slowdown", 0x20: "too hot (software)", 0x40: "too hot (hardware)", 0x80: "power brake"}


def measure(peer: Peer) -> dict[str, Any]:
    ranks = 1 if sees_one_gpu() else peer.ranks_here  # that share what this process sees
    found: dict[str, Any] = {"torch": torch.cuda.device_count(), "ranks": ranks, "gpus": [], "problem": ""}
    found["hidden"] = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if shutil.which("nvidia-smi") is None:
        return found
    for name in NAMES:
        command = ["nvidia-smi", f"--query-gpu={FIELDS.format(name)}", "--format=csv,noheader,nounits"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS,
                                    check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            return found | {"problem": f"nvidia-smi gave no answer within {SECONDS:.0f} s"}
        if not answer.returncode:
            return found | {"gpus": [parse(line) for line in answer.stdout.splitlines()[:MOST_GPUS] if line.strip()]}
    return found | {"problem": f"nvidia-smi: {(answer.stdout or answer.stderr).strip()[:200]}"}


def parse(line: str) -> dict[str, Any]:
    """A line of nvidia-smi. What the card does not know ("[N/A]") is None."""
    index, name, clock, reasons, errors = (value.strip()[:100] for value in (line + "," * 5).split(",")[:5])
    return {
        "index": index,
        "name": name,
        "clock": _number(clock),
        "reasons": _number(reasons),
        "ecc": _number(errors),
    }


def _number(text: str) -> int | None:
    try:
        return int(text, 0)
    except ValueError:
        return None


def judge(reports: Reports) -> Verdict:
    problems = []

    def add(level: Any, seen: str, remedy: str) -> None:
        if seen:
            problems.append(Problem(level, seen, remedy))

    for host, report in reports.items():
        if report["problem"]:
            add("FAILED", f"{host}: {report['problem']}", "restart the host, or leave it out")
        elif report["gpus"] and not report["torch"] and not report["hidden"]:
            add(
                "warning", f"{host}: torch can use none of {len(report['gpus'])} GPUs", "install a torch for its CUDA"
            )
        elif 0 < report["torch"] < report["ranks"]:
            seen = f"{host}: {report['torch']} GPUs for {report['ranks']} ranks"
            add("FAILED", seen, "start as many ranks on a host as it has GPUs")
    told = mismatch("GPUs", {host: report["torch"] for host, report in reports.items()})
    add("FAILED", told, "give the job hosts with the same number of GPUs, or repair or leave out those with fewer")
    cards = {host: names(_kinds(report)) or "none" for host, report in reports.items()}
    add(
        "warning",
        mismatch("kind of GPU", cards),
        "all wait for the slowest: use hosts with the same cards and clocks",
    )
    for host, report in reports.items():
        for gpu in report["gpus"]:
            where, reasons = f"{host} GPU {gpu['index']}", gpu["reasons"] or 0
            throttled = " and ".join(text for bit, text in THROTTLED.items() if reasons & bit)
            add("warning", throttled and f"{where} is slowed: {throttled}", "check its cooling and power supply")
            ecc = f"{where} has {gpu['ecc']} uncorrected memory errors" if gpu["ecc"] else ""
            add("FAILED", ecc, "reset the GPU or leave the host out")
    first = next(iter(reports.values()))
    return Verdict(f"{first['torch']} on each host ({next(iter(cards.values()))})", problems)


def _kinds(report: dict[str, Any]) -> list[str]:
    """E.g. "NVIDIA H100, 1980 MHz at most"."""
    return sorted({gpu["name"] + (f" of {gpu['clock']} MHz" if gpu["clock"] else "") for gpu in report["gpus"]})
