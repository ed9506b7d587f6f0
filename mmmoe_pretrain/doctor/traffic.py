"""Judges what ``network.py`` measured: names the rank whose numbers are wrong, and the slow one beside the median."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from mmmoe_pretrain.doctor.result import Level, Problem, Reports, Verdict, names, size

SLOW, BROKEN = 0.5, 0.1  # of the median, below which a link is slow, and as good as broken
WRONG = "leave the host out and test its memory, cards and cables; NCCL_DEBUG=INFO tells which path NCCL takes"
CARDS = (
    "leave the host out, or check its network card (ethtool), cable and switch port, and that NCCL_SOCKET_IFNAME or "
    "GLOO_SOCKET_IFNAME names the fast network"
)


def judge_backend(reports: Reports) -> Verdict:
    return Verdict(f"{next(iter(reports.values()))} over {len(reports)} rank{'s' * (len(reports) > 1)}")


def blamed(wrong: Mapping[str, Sequence[str]]) -> list[str]:
    """``wrong``: of each rank, those whose numbers it saw wrong."""
    observers = {rank: seen for rank, seen in wrong.items() if seen}
    if not observers:
        return []
    few = len(wrong) < 3  # what a rank sends itself may be right
    sources = [rank for rank in wrong if all(rank in seen for other, seen in wrong.items() if few or other != rank)]
    if 0 < len(sources) < len(wrong):
        return [f"{source} sends wrong numbers to all" for source in sources]
    of_all = [rank for rank, seen in observers.items() if len(seen) == len(wrong)]
    if of_all and len(wrong) > 1:
        return [f"{rank} gets wrong numbers from all" for rank in of_all]
    return [f"{rank} gets wrong numbers from {names(seen)}" for rank, seen in observers.items()]


def judge_collective(reports: Reports) -> Verdict:
    problems = [
        Problem("FAILED", told, WRONG) for told in blamed({rank: its["wrong"] for rank, its in reports.items()})
    ]
    rate = min(its["rate"] for its in reports.values())
    return Verdict(f"exact; {size(rate)}/s a rank" if len(reports) > 1 else "exact; one rank", problems)


def slow_links(rates: Mapping[tuple[str, str], float]) -> Iterator[tuple[float, str]]:
    """Each with its rate. A rank all of whose links in one direction are slow is named itself, else the link."""
    usual = median(rates.values())
    beside = f"/s (the median of all links is {size(usual)}/s)"
    left = {link: rate for link, rate in rates.items() if rate < SLOW * usual}
    for end, verb in ((0, "sends"), (1, "receives")):
        for rank in dict.fromkeys(link[end] for link in left):
            its = [link for link in rates if link[end] == rank]
            if len(its) > 1 and all(rates[link] < SLOW * usual for link in its):
                best = max(rates[link] for link in its)
                yield best, f"{rank} {verb} {size(best)}{beside}"
                left = {link: rate for link, rate in left.items() if link not in its}
    for (source, target), rate in left.items():
        yield rate, f"{source} to {target}: {size(rate)}{beside}"


def judge_links(reports: Reports) -> Verdict:
    rates = {(source, to): rate for its in reports.values() for source, to, rate in its["links"]}
    if not rates:
        return Verdict("one rank: no links")
    wrong = [f"{rank} gets wrong numbers from {names(its['wrong'])}" for rank, its in reports.items() if its["wrong"]]
    problems = [Problem("FAILED", names(wrong), WRONG)] if wrong else []
    slow = sorted(slow_links(rates))  # the slowest first
    if slow:
        level: Level = "FAILED" if slow[0][0] < BROKEN * median(rates.values()) else "warning"
        problems.append(Problem(level, names(told for _, told in slow), CARDS))
    seen = f"exact; {len(rates)} links, median {size(median(rates.values()))}/s, least {size(min(rates.values()))}/s"
    return Verdict(seen, problems)
