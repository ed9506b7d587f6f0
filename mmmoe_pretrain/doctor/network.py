"""Collectives and point-to-point transfers of exact integers, timed: what every rank measures. NCCL on GPUs, gloo on
CPUs. ``traffic.py`` judges it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mmmoe_pretrain.doctor.peer import Peer, open_store
from mmmoe_pretrain.parallel.runtime import process_group

TIMEOUT = 10.0  # minutes: the checks have limits of their own, and NCCL's watchdog would end the process
ALL = "waited for all ranks"
SIZES = {"cpu": 1 << 19, "cuda": 1 << 24}  # int32 numbers of a collective: 2 MB, 64 MB
REPEATS = {"cpu": 2, "cuda": 5}
TRANSFER, FIRST = 1 << 22, 1 << 16  # int32 numbers point to point: 16 MB at most; the first time 256 kB
TRIES, ENOUGH = 8, 0.3  # transfers over a link, the best of which counts, and their seconds
PRIME = 1_000_003


def connect(peer: Peer) -> str:
    """Makes the process group; its backend. It is used by the checks after this one, in other threads."""
    store = dist.PrefixStore("group", open_store(20.0)) if "WORLD_SIZE" in os.environ else None
    peer.stage = ALL
    peer.device = peer.group.enter_context(process_group(TIMEOUT, store))
    _check_in(peer)
    return dist.get_backend()


def _check_in(peer: Peer) -> None:
    if peer.device.type == "cuda":
        torch.cuda.set_device(peer.device)  # of this thread
    dist.all_reduce(torch.zeros(1, device=peer.device))
    _wait(peer)


def _wait(peer: Peer) -> None:
    if peer.device.type == "cuda":
        torch.cuda.synchronize()


def _seconds(peer: Peer, action: Callable[[], object]) -> float:
    """Of one call, the fastest of some."""
    best = float("inf")
    for _ in range(REPEATS[peer.device.type]):
        _check_in(peer)
        began = time.monotonic()
        action()
        _wait(peer)
        best = min(best, time.monotonic() - began)
    return best


def all_reduce(peer: Peer) -> dict[str, Any]:
    """Each number is of one rank, the others add 0: so a wrong sum names the rank that it is of."""
    peer.stage = ALL
    _check_in(peer)
    position = torch.arange(SIZES[peer.device.type], dtype=torch.int32, device=peer.device)
    owner, wanted = position % peer.world, position % PRIME + 1
    sums = torch.where(owner == peer.rank, wanted, 0)
    dist.all_reduce(sums)
    wrong = owner[sums != wanted].unique().tolist()
    seconds = _seconds(peer, lambda: dist.all_reduce(sums))
    moved = sums.nbytes * 2 * (peer.world - 1) / peer.world
    return {"wrong": [peer.labels[rank] for rank in wrong], "rate": moved / seconds}


def all_to_all(peer: Peer) -> dict[str, Any]:
    peer.stage = ALL
    _check_in(peer)
    count = max(1, SIZES[peer.device.type] // peer.world)
    position = torch.arange(count, dtype=torch.int32, device=peer.device)
    ranks = torch.arange(peer.world, dtype=torch.int32, device=peer.device)[:, None]
    sent = _pattern(peer.rank, ranks, position)
    received = torch.zeros_like(sent)
    dist.all_to_all_single(received, sent)
    wrong = (received != _pattern(ranks, peer.rank, position)).any(dim=1).nonzero().flatten().tolist()
    seconds = _seconds(peer, lambda: dist.all_to_all_single(received, sent))
    moved = sent.nbytes * (peer.world - 1) / peer.world
    return {"wrong": [peer.labels[rank] for rank in wrong], "rate": moved / seconds}


def _pattern(source: Any, target: Any, position: torch.Tensor) -> torch.Tensor:
    return (source * 31 + target * 17 + position) % PRIME + 1


def rings(hosts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Ranks that pass data round: the first ranks of all hosts, the second ones, and so on (each may have a network
    card of its own); on one host all its ranks."""
    if len(hosts) == 1:
        return [list(hosts[0])]
    return [list(ring) for ring in zip(*hosts, strict=False)]


def rounds(ring: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The links of a ring in both directions, (from, to), in rounds of transfers that share no rank."""
    count, found = len(ring), []
    for way in () if count < 2 else (ring, ring[::-1])[: 1 if count == 2 else 2]:
        links = list(zip(way, [*way[1:], way[0]], strict=True))
        even = count - count % 2
        found += [links[:even:2], links[1:even:2], links[even:]]
    return [links for links in found if links]


def point_to_point(peer: Peer) -> dict[str, Any]:
    """The links to this rank: from whom, and bytes a second; and from whom wrong numbers came."""
    peer.stage = ALL
    _check_in(peer)
    found: dict[str, Any] = {"links": [], "wrong": []}
    peer.partial = found
    for ring in rings(list(peer.hosts.values())):
        for links in rounds(ring) if peer.rank in ring else ():
            for source, target in links:
                if peer.rank == source:
                    peer.stage = f"waited for {peer.labels[target]}"
                    _send(peer, target)
                elif peer.rank == target:
                    peer.stage = f"waited for {peer.labels[source]}"
                    rate, right = _receive(peer, source)
                    found["links"].append([peer.labels[source], peer.labels[target], rate])
                    found["wrong"] += [] if right else [peer.labels[source]]
    return found


def _send(peer: Peer, target: int) -> None:
    """As many numbers and as often as the receiver asks."""
    asked = torch.zeros(1, dtype=torch.int32, device=peer.device)
    values = _pattern(peer.rank, target, torch.arange(TRANSFER, dtype=torch.int32, device=peer.device))
    while dist.recv(asked, target) is not None and (count := int(asked.item())):
        dist.send(asked, target)
        dist.send(values[:count], target)
        _wait(peer)


def _receive(peer: Peer, source: int) -> tuple[float, bool]:
    """Bytes a second, the best of some transfers, and whether all numbers are right."""
    wanted = _pattern(source, peer.rank, torch.arange(TRANSFER, dtype=torch.int32, device=peer.device))
    rates: list[float] = []
    right, count, total = True, FIRST, 0.0
    while len(rates) < TRIES and total < ENOUGH:
        asked, values = torch.full_like(wanted[:1], count), torch.zeros_like(wanted[:count])
        dist.send(asked, source)
        dist.recv(asked, source)
        _wait(peer)
        began = time.monotonic()
        dist.recv(values, source)
        _wait(peer)
        seconds = time.monotonic() - began
        rates.append(values.nbytes / seconds)
        right = right and torch.equal(values, wanted[:count])
        total += seconds
        count = max(count, min(TRANSFER, int(max(rates) * ENOUGH / values.itemsize)))
    dist.send(torch.zeros_like(wanted[:1]), source)
    return max(rates), right
