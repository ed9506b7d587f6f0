"""What the ranks tell each other of their progress, beside the training's groups: through a small store
that rank 0 serves in a thread without Python, so that it answers whatever Python does.

Every rank writes its own beat; rank 0 alone reads them all, so that a thousand ranks cost little.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

_ADDRESS_BYTES = 256
T = TypeVar("T")


@dataclass(frozen=True)
class Beat:
    """How far a rank is. ``age``: seconds since its main thread last told of progress, by its own clock."""

    rank: int
    step: int = 0
    phase: str = "start"
    count: int = 0  # beats of this step
    age: float = 0.0
    longest: float = 0.0  # seconds of the slowest step that this process has seen end
    sequence: int = 0  # grows as long as the rank can publish at all
    left: str = ""  # why it has said goodbye
    last_word: bool = False  # from here on, of a rank that ends because the job hangs
    where: str = ""  # its main thread, e.g. "loop.py:120 _run"
    waits_in: str = ""  # a collective that has not ended, e.g. "gloo:all_reduce #4 of default_pg"

    @property
    def position(self) -> tuple[int, int]:
        """Grows with progress, alike on every rank."""
        return self.step, self.count

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Beat:
        return cls(**json.loads(text))


class NoAnswer(Exception):
    """The store is there, and silent: rank 0's machine is stopped or cut off."""


class Gone(Exception):
    """The store has ended, and rank 0's process with it."""


class Board:
    """The store. Every call ends within its seconds, by NoAnswer or Gone where it must."""

    def __init__(self, store: dist.TCPStore) -> None:
        self._store = store

    def publish(self, beat: Beat, seconds: float) -> None:
        _bounded(lambda: self._store.set(_key(beat.rank), beat.to_json()), seconds)

    def look(self, ranks: Iterable[int], seconds: float) -> tuple[str, dict[int, Beat]]:
        """The verdict, empty while there is none, and the beats of some ranks."""
        wanted = list(ranks)
        verdict, *beats = _bounded(lambda: self._store.multi_get(["verdict", *map(_key, wanted)]), seconds)
        return json.loads(verdict), {rank: Beat.from_json(text) for rank, text in zip(wanted, beats, strict=True)}

    def condemn(self, reason: str, seconds: float) -> None:
        """Tell every rank that the job hangs, and why."""
        _bounded(lambda: self._store.set("verdict", json.dumps(reason)), seconds)


def _bounded(call: Callable[[], T], seconds: float) -> T:
    """In a thread of its own: torch's client waits without end for a server that is stopped, timeout or not."""
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
        raise Gone("rank 0's process has ended") from results[0]
    return results[0]


def open_board(group: dist.ProcessGroup, timeout_seconds: float) -> tuple[Board, str]:
    """Collective over ``group``, which is of all ranks and on the host. Also a name of this start of the job,
    equal on every rank. The others reach rank 0 by MASTER_ADDR where it is set, else by its machine's name."""
    timeout = timedelta(seconds=timeout_seconds)
    address = torch.zeros(_ADDRESS_BYTES, dtype=torch.uint8)
    if dist.get_rank() == 0:
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        store.set("verdict", json.dumps(""))
        for rank in range(dist.get_world_size()):  # a key that is missing would make readers wait
            store.set(_key(rank), Beat(rank).to_json())
        told = f"{host} {store.port} {name_of_start()}".encode()
        address[: len(told)] = torch.frombuffer(bytearray(told), dtype=torch.uint8)
    dist.broadcast(address, src=0, group=group)
    host, port, name = bytes(address.tolist()).rstrip(b"\0").decode().split()
    if dist.get_rank():
        store = dist.TCPStore(host, int(port), is_master=False, timeout=timeout, wait_for_workers=False)
    return Board(store), name


def name_of_start() -> str:
    """E.g. 20260801T120000."""
    return time.strftime("%Y%m%dT%H%M%S")


def _key(rank: int) -> str:
    return f"beat/{rank}"
