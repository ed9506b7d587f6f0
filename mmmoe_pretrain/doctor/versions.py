"""Versions of what a run stands on: they must be the same on all hosts."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import mmmoe_pretrain
from mmmoe_pretrain.doctor.peer import Peer
from mmmoe_pretrain.doctor.result import Problem, Reports, Verdict, mismatch

PACKAGES = ("megatron-core", "deepspeed", "numpy")
MAY_DIFFER = ("numpy", "driver", "kernel")  # a warning alone
DRIVER = Path("/proc/driver/nvidia/version")
REMEDY = "install the same everywhere, e.g. by one image or one environment on a shared folder"


def measure(peer: Peer) -> dict[str, str]:
    found = {"mmmoe": mmmoe_pretrain.__version__, "its code": _code(), "python": platform.python_version()}
    found |= {"torch": torch.__version__, **{name: _version(name) for name in PACKAGES}}
    found["CUDA"] = torch.version.cuda or "none"
    if torch.version.cuda:
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    found["driver"] = _driver()
    return found | {"kernel": os.uname().release}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _code() -> str:
    """A digest of this package's files."""
    root, digest = Path(mmmoe_pretrain.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def _driver() -> str:
    try:
        text = DRIVER.read_text(encoding="utf-8", errors="replace")[:1000]
    except OSError:
        return "none"
    words = text.splitlines()[0].split() if text else []
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")


def judge(reports: Reports) -> Verdict:
    problems = []
    kinds = dict.fromkeys(kind for report in reports.values() for kind in report)
    for kind in kinds:
        if told := mismatch(kind, {host: report.get(kind, "none") for host, report in reports.items()}):
            problems.append(Problem("warning" if kind in MAY_DIFFER else "FAILED", told, REMEDY))
    first = next(iter(reports.values()))
    return Verdict(", ".join(f"{kind} {value}" for kind, value in first.items()), problems)
