"""The run's folder: room on its disk, a write to it, and whether all hosts see the same one."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from mmmoe_pretrain.doctor.peer import Peer
from mmmoe_pretrain.doctor.result import Problem, Reports, Verdict, names, size

LEAST_FREE = 10 << 30  # bytes; a checkpoint has 16 bytes a parameter or so
WRITTEN = 1 << 20  # bytes of the write test
PREFIX = ".mmmoe-doctor-"
PATIENCE = 6.0  # seconds: a network file system shows a new file late
TOKEN = "token"


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists (if that is a file, nothing can be written there)."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def disk(peer: Peer) -> dict[str, Any]:
    """Free bytes, and the error of a write; nothing of it is left."""
    place = existing(peer.run_dir)
    found: dict[str, Any] = {"free": shutil.disk_usage(place).free, "place": str(place), "error": ""}
    try:
        with tempfile.NamedTemporaryFile(prefix=PREFIX, dir=place) as file:
            file.write(os.urandom(WRITTEN))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        found["error"] = error.strerror or str(error)
    return found


def judge_disk(reports: Reports) -> Verdict:
    problems = []
    failed = [
        f"{host} cannot write to {its['place']} ({its['error']})" for host, its in reports.items() if its["error"]
    ]
    if failed:
        remedy = "make room, change its owner or mode, or set runs_dir to another place"
        problems.append(Problem("FAILED", names(failed), remedy))
    low = [
        f"{host} has {size(its['free'])} free at {its['place']}"
        for host, its in reports.items()
        if not its["error"] and its["free"] < LEAST_FREE
    ]
    if low:
        problems.append(Problem("warning", names(low), "make room, or lower checkpoint.keep_last"))
    free = min(its["free"] for its in reports.values())
    return Verdict(f"{size(free)} free at {next(iter(reports.values()))['place']}, or more; written", problems)


def shared(peer: Peer) -> dict[str, Any]:
    """Rank 0 writes a token, which all read; each writes one of its own, which rank 0 reads."""
    return _as_first(peer) if peer.rank == 0 else _as_other(peer)


def _as_first(peer: Peer) -> dict[str, Any]:
    folder, others = None, [rank for rank in peer.leaders[1:] if rank not in peer.lost]
    try:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=existing(peer.run_dir)))
        folder.chmod(0o777)  # the others may be other users to the file system
        (folder / TOKEN).write_text(folder.name, encoding="ascii")
        peer.channel.say("folder", str(folder))
        done = peer.channel.gather((f"folder/{rank}" for rank in others), PATIENCE + 2.0)
        wrote = [rank for rank in others if done.get(f"folder/{rank}")]
        unseen = [peer.labels[rank] for rank in wrote if not _appears(folder, str(rank), str(rank))]
        return {"place": str(folder.parent), "seen": True, "unseen": unseen}
    except OSError as error:
        place = str(existing(peer.run_dir))
        return {"place": place, "seen": True, "unseen": [], "error": error.strerror or str(error)}
    finally:
        if folder is None:
            peer.channel.say("folder", "")
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _as_other(peer: Peer) -> dict[str, Any]:
    folder, wrote = Path(peer.channel.hear("folder", PATIENCE)), False
    try:
        seen = folder.is_absolute() and _appears(folder, TOKEN, folder.name)
        if seen:
            (folder / str(peer.rank)).write_text(str(peer.rank), encoding="ascii")
            wrote = True
    finally:
        peer.channel.say(f"folder/{peer.rank}", wrote)
    return {"place": str(folder.parent), "seen": seen, "unseen": []}


def _appears(folder: Path, name: str, text: str) -> bool:
    """Whether a file with this text appears in time."""
    deadline = time.monotonic() + PATIENCE / 2
    while True:
        try:
            os.listdir(folder.parent)  # a network file system then asks its server what is new
            with (folder / name).open(encoding="ascii", errors="replace") as file:
                if file.read(1000) == text:
                    return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def judge_shared(reports: Reports) -> Verdict:
    place = next(iter(reports.values()))["place"]
    first, its = next(iter(reports.items()))
    if error := its.get("error"):
        remedy = "make room, change its owner or mode, or set runs_dir to another place"
        return Verdict(place, [Problem("FAILED", f"{first} cannot write to {place} ({error})", remedy)])
    apart = [host for host, its in reports.items() if not its["seen"]]
    apart += [host for its in reports.values() for host in its["unseen"]]
    if not apart:
        return Verdict(f"all hosts see each other's files in {place}" if len(reports) > 1 else "one host")
    remedy = "mount the same network file system on all hosts, and set runs_dir to a folder on it"
    seen = f"{names(apart)} and the first host do not see each other's files in {place}"
    return Verdict(place, [Problem("FAILED", seen, remedy)])
