"""How far each host's clock is from rank 0's: by messages to and fro, whose delay bounds the error (as NTP does)."""

from __future__ import annotations

import time

from mmmoe_pretrain.doctor.peer import Peer
from mmmoe_pretrain.doctor.result import Level, Problem, Reports, Verdict, names

ROUNDS = 5
PATIENCE = 2.0  # seconds of rank 0 for a host's next message
WARN, FAIL = 1.0, 10.0  # seconds; torchrun takes a host for dead whose clock is 15 s behind another's


def measure(peer: Peer) -> list[float]:
    """The offset from rank 0's clock, and the most that it may be wrong, in seconds."""
    if peer.rank == 0:
        _serve(peer)
        return [0.0, 0.0]
    best = (0.0, float("inf"))
    for number in range(ROUNDS):
        key = f"clock/{peer.rank}/{number}"
        began, here = time.monotonic(), time.time()
        peer.channel.say(f"{key}/ask", 0)
        there = peer.channel.hear(f"{key}/answer", 20.0)
        half = (time.monotonic() - began) / 2
        best = min(best, (here + half - there, half), key=lambda found: found[1])
    return list(best)


def _serve(peer: Peer) -> None:
    for rank in peer.leaders:
        for number in range(ROUNDS if rank not in {0, *peer.lost} else 0):
            key = f"clock/{rank}/{number}"
            try:
                peer.channel.hear(f"{key}/ask", PATIENCE)
            except TimeoutError:
                break  # it will be missed
            peer.channel.say(f"{key}/answer", time.time())


def judge(reports: Reports) -> Verdict:
    problems = []
    ranges: tuple[tuple[Level, float, float], ...] = (("FAILED", FAIL, float("inf")), ("warning", WARN, FAIL))
    for level, low, high in ranges:
        far = [
            f"{host} is {abs(offset):.3g} s {'ahead of' if offset > 0 else 'behind'} rank 0 (± {error:.2g} s)"
            for host, (offset, error) in reports.items()
            if low < abs(offset) - error <= high
        ]
        if far:
            remedy = "synchronise its clock (chronyc makestep, timedatectl set-ntp true)"
            problems.append(Problem(level, names(far), remedy))
    offset, error = max(reports.values(), key=lambda found: abs(found[0]))
    return Verdict(f"within {abs(offset) + error:.2g} s of rank 0", problems)
