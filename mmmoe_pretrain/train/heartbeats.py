"""Heartbeats: what ranks publish of their progress, when they show that the job hangs, and the message about it.

They use a store that rank 0 serves in a native thread, which answers while Python is blocked, and not the process
groups of training. Every rank writes its own heartbeat; only rank 0 reads all of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from mmmoe_pretrain.parallel.agreement import from_rank_0

# How often faults.hang_minutes a rank may go without progress in phases that are slow and legal.
ALLOWANCE = {
    "start": 10.0,  # building the model and the engine
    "compile": 10.0,  # the first step of a process
    "load": 10.0,
    "save": 10.0,
    "evaluate": 10.0,  # a step of validation samples, which nothing has read ahead
}
STEPS = 3.0  # times the slowest step before it that a step may take: many microbatches, each of them quick
T = TypeVar("T")


@dataclass(frozen=True)
class Heartbeat:
    """The progress of a rank. ``age``: seconds since the last progress of its main thread, by its own clock."""

    rank: int
    step: int = 0
    phase: str = "start"
    count: int = 0  # beats of this step
    age: float = 0.0
    longest: float = 0.0  # seconds of the slowest step that this process has seen end
    sequence: int = 0  # grows as long as the rank can publish at all
    left: str = ""  # the reason it ended
    final: bool = False  # the last one before the rank ends because the job hangs; the next two are known
    where: str = ""  # its main thread, e.g. "loop.py:120 _run"
    waits_in: str = ""  # a collective that has not ended, e.g. "gloo:all_reduce #4 of default_pg"

    @property
    def position(self) -> tuple[int, int]:
        """Grows with progress, in the same way on every rank."""
        return self.step, self.count

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Heartbeat:
        return cls(**json.loads(text))


class NoAnswer(Exception):
    """The store does not answer: rank 0's machine is stopped or cut off."""


class StoreGone(Exception):
    """The store has ended, and rank 0's process with it."""


class HeartbeatStore:
    """Every call returns within its timeout or raises NoAnswer or StoreGone."""

    def __init__(self, store: dist.TCPStore) -> None:
        self._store = store

    def publish(self, beat: Heartbeat, seconds: float) -> None:
        _bounded(lambda: self._store.set(_key(beat.rank), beat.to_json()), seconds)

    def read(self, ranks: Iterable[int], seconds: float) -> tuple[str, dict[int, Heartbeat]]:
        """Why the job hangs (empty if it does not), and the heartbeats of some ranks."""
        wanted = list(ranks)
        hang, *beats = _bounded(lambda: self._store.multi_get(["hang", *map(_key, wanted)]), seconds)
        return json.loads(hang), {rank: Heartbeat.from_json(text) for rank, text in zip(wanted, beats, strict=True)}

    def publish_hang(self, reason: str, seconds: float) -> None:
        """Tell every rank that the job hangs, and why."""
        _bounded(lambda: self._store.set("hang", json.dumps(reason)), seconds)


def _bounded(call: Callable[[], T], seconds: float) -> T:
    """Runs in its own thread, because torch's client ignores its timeout if the server is stopped."""
    results: list[T | dist.DistError] = []

    def run() -> None:
        try:
            results.append(call())
        except dist.DistError as error:
            results.append(error)

    thread = threading.Thread(target=run, name="heartbeat", daemon=True)
    thread.start()
    thread.join(seconds)
    if not results or isinstance(results[0], dist.DistStoreError):
        raise NoAnswer(f"rank 0 gave no answer for {seconds:.0f} s")
    if isinstance(results[0], dist.DistError):
        raise StoreGone("rank 0's process has ended") from results[0]
    return results[0]


def open_store(group: dist.ProcessGroup, timeout_seconds: float) -> tuple[HeartbeatStore, str]:
    """The store, and a name of this start of the job, equal on every rank. Collective over ``group``: all ranks, on
    the host. The others reach rank 0 by MASTER_ADDR where it is set, else by its machine's name."""
    timeout = timedelta(seconds=timeout_seconds)
    served: list[dist.TCPStore] = []

    def serve() -> tuple[str, int, str]:
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        store.set("hang", json.dumps(""))
        for rank in range(dist.get_world_size()):  # a missing key would make readers wait
            store.set(_key(rank), Heartbeat(rank).to_json())
        served.append(store)
        return host, store.port, start_name()

    host, port, name = from_rank_0(group, serve)
    if not served:
        served.append(dist.TCPStore(host, port, is_master=False, timeout=timeout, wait_for_workers=False))
    return HeartbeatStore(served[0]), name


def start_name() -> str:
    """E.g. 20260801T120000."""
    return time.strftime("%Y%m%dT%H%M%S")


def _key(rank: int) -> str:
    return f"beat/{rank}"


def allowed(beat: Heartbeat, limit: float) -> float:
    """Seconds without progress in the phase of ``beat``, ``limit`` being those of a plain one."""
    if beat.phase == "step":
        return max(limit, STEPS * beat.longest)
    return limit * ALLOWANCE.get(beat.phase, 1.0)


def silent_ranks(beats: Mapping[int, Heartbeat], silence: Mapping[int, float], limit: float) -> list[int]:
    """Ranks whose heartbeat has not changed for too long and that have not ended. The thread that publishes runs in
    every phase, so no phase has an allowance."""
    return [rank for rank, beat in beats.items() if not beat.left and silence[rank] > limit]


def stalled_ranks(beats: Mapping[int, Heartbeat], limit: float) -> list[int]:
    """Ranks without progress for too long; none while a rank is within the allowance of a slow phase, since the
    others may wait for it."""
    here = [beat for beat in beats.values() if not beat.left]
    if any(limit < allowed(beat, limit) >= beat.age for beat in here):
        return []
    return [beat.rank for beat in here if beat.age > allowed(beat, limit)]


def waited_for(beats: Mapping[int, Heartbeat], silent: Collection[int]) -> tuple[list[int], str]:
    """The ranks that the others wait for, as far as the heartbeats show, and why."""
    if silent:
        return sorted(silent), "silent: stopped, dead, or stuck outside Python"
    left = sorted(rank for rank, beat in beats.items() if beat.left)
    if left:
        return left, "has left"
    furthest = max((beat.position for beat in beats.values()), default=(0, 0))
    behind = sorted(rank for rank, beat in beats.items() if beat.position < furthest)
    if behind:
        return behind, "behind the others"
    outside = sorted(rank for rank, beat in beats.items() if not beat.waits_in)
    if outside and len(outside) < len(beats):
        return outside, "in no collective, as the others are"
    return [], ""


def describe(reason: str, beats: Mapping[int, Heartbeat], silent: Collection[int], code: int, folder: str) -> str:
    """The message: why the job ends, which ranks the others wait for, and where each group of ranks is.

    ``silent``: ranks of ``beats`` that did not answer at the end.
    """
    lines = [f"The job hangs: {reason}. It ends with exit code {code}; the stacks of all ranks are in {folder}."]
    waited, why = waited_for(beats, silent)
    if waited:
        lines.append(f"The others wait for {_ranks(waited)} ({why}).")
    else:
        lines.append(
            "No rank is behind the others: all are waiting, maybe for each other; compare their flight records."
        )
    groups: dict[tuple[bool, tuple[int, int], tuple[str, str]], list[Heartbeat]] = defaultdict(list)
    for rank, beat in sorted(beats.items()):
        groups[rank not in waited, beat.position, _state(beat, rank in silent)].append(beat)
    for (_, _, (before, after)), members in sorted(groups.items(), key=lambda item: item[0]):
        ages = sorted({round(beat.age) for beat in members})
        seconds = f"{ages[0]} to {ages[-1]}" if len(ages) > 1 else f"{ages[0]}"
        lines.append(f"  {_ranks([beat.rank for beat in members])}: {before} for {seconds} s{after}")
    return "\n".join(lines)


def _state(beat: Heartbeat, silent: bool) -> tuple[str, str]:
    """The text before and after the seconds without progress."""
    place = f'step {beat.step}, "{beat.phase}"'
    if beat.left:
        return f"left: {beat.left}; before, in {place}", ""
    if silent:
        return f"last heard of in {place}", " then"
    details = ", ".join(filter(None, [beat.waits_in and f"in {beat.waits_in}", beat.where and f"at {beat.where}"]))
    return f"in {place}", f", {details}" if details else ""


def _ranks(ranks: Sequence[int]) -> str:
    """E.g. "ranks 0, 2-7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return f"rank{'s' * (len(ranks) > 1)} {', '.join('-'.join(map(str, run)) for run in runs)}"
