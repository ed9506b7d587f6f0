"""The limit of bad samples of a run: a statistical test over the counts of all ranks."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field

from mmmoe_pretrain.data.decode import BadSample
from mmmoe_pretrain.data.loader import LoadStats

logger = logging.getLogger(__name__)
KEYS_NAMED = 5
MAX_LOGGED = 1000  # on a rank; the others are only counted
FALSE_ALARM = 1e-6  # chance of ending a run whose share of bad samples is within the limit


@dataclass
class BadBudget:
    """Ends the run when the share of bad samples is almost surely above ``limit``.

    b bad ones of n read are tested by the Chernoff bound (Hoeffding 1963, theorem 1): were the share
    no more than q, so many would turn up with a chance of at most ``exp(-n KL(b/n || q))``, where
    ``KL(p || q) = p ln(p/q) + (1-p) ln((1-p)/(1-q))``. The run ends where that is below FALSE_ALARM.
    At a limit of 1%: 2 of 128 or 1 of 8 are within it; 4 of 4, 11 of 128 or 25 of 600 end the run. A limit of 0 ends
    it at the first bad sample, a limit of 1 never.
    """

    limit: float
    bad: int = 0  # on this rank
    read: int = 0
    first: list[BadSample] = field(default_factory=list)

    def add(self, stats: LoadStats) -> None:
        """Count what this rank read, and log its bad samples."""
        for sample in stats.bad[: max(0, MAX_LOGGED - self.bad)]:
            logger.warning("skipped sample %s", sample)
        if self.bad < MAX_LOGGED <= self.bad + len(stats.bad):
            logger.warning("%d bad samples on this rank; further ones are counted, but not logged", MAX_LOGGED)
        self.first += stats.bad[: KEYS_NAMED - len(self.first)]
        self.bad += len(stats.bad)
        self.read += stats.samples

    def check(self, total_bad: int, total_read: int) -> None:
        """Raise ValueError past the limit: on every rank, as all are given the same totals.

        The totals are ``bad`` and ``read`` summed over the data-parallel ranks.
        """
        if log_chance(total_bad, total_read, self.limit) >= math.log(FALSE_ALARM):
            return
        named = "; ".join(map(str, self.first))
        where = f"The first: {named}" if named else "None was on this rank: the logs of the others name them"
        raise ValueError(
            f"{total_bad} of {total_read} samples read were bad, more than "
            f"data.max_bad_fraction {self.limit} allows. {where}. Repair or "
            f"remove these files and shard again (mmmoe-data shard), or raise data.max_bad_fraction"
        )


def log_chance(bad: int, read: int, share: float) -> float:
    """The logarithm of an upper bound on the chance of ``bad`` or more of ``read``, where each is bad
    with probability ``share`` or less."""
    if bad <= share * read:
        return 0.0
    if share == 0:
        return -math.inf
    chance = bad * math.log(bad / (share * read))
    if bad < read:
        chance += (read - bad) * math.log((read - bad) / ((1 - share) * read))
    return -chance
