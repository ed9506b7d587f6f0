"""Limits of the operating system and of containers that end runs later: /dev/shm, open files, locked memory."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

from mmmoe_pretrain.doctor.peer import Peer
from mmmoe_pretrain.doctor.result import Problem, Reports, Verdict, names, size

SHARED = Path("/dev/shm")
LEAST_SHARED = 1 << 30  # a container's default is 64 MB
INFINIBAND = Path("/sys/class/infiniband")
LEAST_LOCKED = 1 << 30


def shared_memory(peer: Peer) -> int:
    return shutil.disk_usage(SHARED).total if SHARED.is_dir() else 0


def judge_shared_memory(reports: Reports) -> Verdict:
    low = [f"{host} has {size(total)}" for host, total in reports.items() if total < LEAST_SHARED]
    remedy = (
        "data workers and NCCL need 1 GB or more: docker --shm-size=8g, Kubernetes: an emptyDir of medium Memory at "
        "/dev/shm, else mount -o remount,size=8G /dev/shm"
    )
    return Verdict(f"{size(min(reports.values()))} or more", [Problem("warning", names(low), remedy)] if low else [])


def open_files(peer: Peer) -> list[int]:
    """The hard limit (training raises its own to it), and what the ranks may need."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return [hard, 1024 + 8 * peer.world]  # a gloo group of all ranks is a socket to each


def judge_open_files(reports: Reports) -> Verdict:
    low = [f"{host} allows {hard}" for host, (hard, needed) in reports.items() if 0 <= hard < needed]
    needed = max(needed for _, needed in reports.values())
    remedy = f"{needed} or more: ulimit -Hn, LimitNOFILE of slurmd's or containerd's unit, docker --ulimit nofile"
    least = min((hard for hard, _ in reports.values() if hard >= 0), default=-1)
    seen = f"{least} or more" if least >= 0 else "no limit"
    return Verdict(seen, [Problem("FAILED", names(low), remedy)] if low else [])


def locked_memory(peer: Peer) -> list[int]:
    """The number of InfiniBand devices, and the hard limit in bytes, -1 for none."""
    cards = len(list(INFINIBAND.iterdir())) if INFINIBAND.is_dir() else 0
    return [cards, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]]


def judge_locked_memory(reports: Reports) -> Verdict:
    low = [
        f"{host} allows {size(hard)}" for host, (cards, hard) in reports.items() if cards and 0 <= hard < LEAST_LOCKED
    ]
    remedy = "InfiniBand needs it without a limit: LimitMEMLOCK=infinity of slurmd's unit, docker --ulimit memlock=-1"
    seen = "no limit where there is InfiniBand" if any(cards for cards, _ in reports.values()) else "no InfiniBand"
    return Verdict(seen, [Problem("FAILED", names(low), remedy)] if low else [])
