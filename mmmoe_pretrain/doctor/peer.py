"""A rank among the others, and its messages to them: through the store of rank 0, which answers although a process
group does not. Every wait has a limit."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.doctor.result import names

JOIN = 25.0  # seconds for all ranks to be there
T = TypeVar("T")


@dataclass(frozen=True)
class Subject:
    """What is checked beside the hosts. ``run_dir``: else that of ``config``."""

    config: Path | None = None
    overrides: Sequence[str] = ()
    run_dir: Path | None = None


class Channel:
    """Small JSON messages by key. Each is written once."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def say(self, key: str, value: object) -> None:
        self._store.set(key, json.dumps(value))

    def hear(self, key: str, seconds: float) -> Any:
        """Raises TimeoutError."""
        try:
            self._store.wait([key], timedelta(seconds=seconds))
        except dist.DistStoreError as error:
            raise TimeoutError(f"no message {key} within {seconds:.0f} s") from error
        return json.loads(self._store.get(key))

    def gather(self, keys: Iterable[str], seconds: float) -> dict[str, Any]:
        """Those that were written within ``seconds``."""
        wanted, deadline = list(keys), time.monotonic() + seconds
        while wanted and not self._store.check(wanted) and time.monotonic() < deadline:
            time.sleep(0.01)
        return {key: json.loads(self._store.get(key)) for key in wanted if self._store.check([key])}


@dataclass
class Peer:
    """This rank. ``labels``: the name of each rank; ``hosts``: the ranks of each host, by its name."""

    channel: Channel
    subject: Subject
    rank: int = 0
    world: int = 1
    labels: list[str] = field(default_factory=list)
    hosts: dict[str, list[int]] = field(default_factory=dict)
    lost: set[int] = field(default_factory=set)  # those that did not answer, as far as this rank knows
    config: RunConfig | None = None  # once it has been read
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # that of the process group
    group: ExitStack = field(default_factory=ExitStack)  # ends it
    stage: str = ""  # of a collective check: what this rank waits for
    partial: Any = None  # what it has measured so far, for where it does not end

    @property
    def leaders(self) -> list[int]:
        """One rank of each host."""
        return [ranks[0] for ranks in self.hosts.values()]

    @property
    def host(self) -> str:
        return next(name for name, ranks in self.hosts.items() if self.rank in ranks)

    def hosts_of(self, ranks: Collection[int]) -> str:
        """Their names."""
        return names(name for name, its in self.hosts.items() if {*ranks} & {*its})

    @property
    def ranks_here(self) -> int:
        return len(self.hosts[self.host])

    @property
    def has_run_dir(self) -> bool:
        return bool(self.subject.run_dir or self.config)

    @property
    def run_dir(self) -> Path:
        return (self.subject.run_dir or self.read_config.run_dir).absolute()

    @property
    def read_config(self) -> RunConfig:
        """Raises ValueError where this host could not read it."""
        if self.config is None:
            raise ValueError(f"the config {self.subject.config} could not be read here (see layout)")
        return self.config


def open_store(seconds: float) -> dist.Store:
    """Rank 0 serves it, unless torchrun does. Raises a DistError where it does not answer."""
    if "WORLD_SIZE" not in os.environ:
        return dist.HashStore()
    serves = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=serves,
        timeout=timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True,
    )  # fmt: skip
    return dist.PrefixStore("doctor", store)


def join(subject: Subject, seconds: float = JOIN) -> Peer:
    """This rank, once it knows the others."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    peer = Peer(Channel(open_store(seconds)), subject, rank, world)
    peer.channel.say(f"hello/{rank}", [socket.gethostname(), int(os.environ.get("GROUP_RANK", "0"))])
    if rank == 0:
        told = peer.channel.gather((f"hello/{other}" for other in range(world)), seconds)
        found = {other: told[f"hello/{other}"] for other in range(world) if f"hello/{other}" in told}
        each = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        peer.channel.say("peers", [name_hosts(found, world, each), sorted({*range(world)} - {*found})])
    peer.hosts, lost = peer.channel.hear("peers", seconds + 5.0)
    peer.lost = set(lost)
    peer.labels = [""] * world
    for name, ranks in peer.hosts.items():
        for each in ranks:
            peer.labels[each] = name if len(ranks) == 1 else f"{name} rank {each}"
    return peer


def name_hosts(found: dict[int, tuple[str, int]], world: int, each: int) -> dict[str, list[int]]:
    """The ranks of each host, from the host name and node number that ranks tell; ``each``: ranks of a host, for
    those that told nothing."""
    nodes: dict[tuple[str, int], list[int]] = {}
    for rank in range(world):
        name, node = found.get(rank, ("", rank // each))
        if not name:  # one of its neighbours may have answered
            name = next((its for its, number in found.values() if number == node), "node")
        nodes.setdefault((name, node), []).append(rank)
    several = {name for name, node in nodes if sum(other == name for other, _ in nodes) > 1} | {"node"}
    return {f"{name} (number {node})" if name in several else name: ranks for (name, node), ranks in nodes.items()}


def limited(seconds: float, action: Callable[[], T]) -> T:
    """Raises TimeoutError after ``seconds``; the thread of ``action`` then goes on, and ends with the process."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)

    thread = threading.Thread(target=run, name="doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"not done within {seconds:.0f} s")
    return results[0]
