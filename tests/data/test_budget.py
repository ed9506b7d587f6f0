"""When bad samples end a run: surely too many over all ranks, and no sooner."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from mmmoe_pretrain.data.budget import FALSE_ALARM, KEYS_NAMED, MAX_LOGGED, BadBudget, log_chance
from mmmoe_pretrain.data.decode import BadSample
from mmmoe_pretrain.data.loader import LoadStats


def bad(count: int) -> tuple[BadSample, ...]:
    return tuple(BadSample(f"k{i}", "why") for i in range(count))


@pytest.mark.parametrize("count, read", [(0, 0), (0, 10), (1, 1), (1, 8), (2, 8), (2, 128), (10, 1000), (12, 1000)])
def test_small_counts_do_not_end_a_run(count: int, read: int) -> None:
    BadBudget(0.01).check(count, read)


@pytest.mark.parametrize("count, read", [(4, 4), (8, 8), (128, 128), (11, 128), (25, 600), (12_000, 1_000_000)])
def test_a_share_that_is_surely_too_high_ends_it(count: int, read: int) -> None:
    with pytest.raises(ValueError, match=rf"{count} of {read} samples read were bad.*max_bad_fraction 0\.01"):
        BadBudget(0.01).check(count, read)


def test_the_limits_zero_and_one_are_what_they_say() -> None:
    BadBudget(1.0).check(500, 500)
    BadBudget(0.0).check(0, 500)
    with pytest.raises(ValueError, match="1 of 500"):
        BadBudget(0.0).check(1, 500)


def test_the_bound_is_above_the_exact_binomial_tail() -> None:
    for read, share in ((10, 0.01), (60, 0.1), (200, 0.03)):
        terms = [math.comb(read, k) * share**k * (1 - share) ** (read - k) for k in range(read + 1)]
        for count in range(read + 1):
            assert math.exp(log_chance(count, read, share)) >= math.fsum(terms[count:]) * (1 - 1e-9)  # rounding


def test_a_run_at_its_limit_is_not_ended_by_many_looks() -> None:
    generator = np.random.default_rng(0)  # 100 runs, tested after each of 500 steps of 256 samples
    totals = generator.binomial(256, 0.01, size=(100, 500)).cumsum(axis=1)
    chances = [log_chance(int(total), 256 * (i + 1), 0.01) for run in totals for i, total in enumerate(run)]
    assert min(chances) > math.log(FALSE_ALARM)


def test_every_rank_ends_by_the_totals_and_names_what_it_knows() -> None:
    budgets = [BadBudget(0.01), BadBudget(0.01)]
    budgets[0].add(LoadStats(64, bad(20)))
    budgets[1].add(LoadStats(64))
    assert [(budget.bad, budget.read) for budget in budgets] == [(20, 64), (0, 64)]
    with pytest.raises(ValueError, match=r"20 of 128 samples .* The first: k0: why; k1: why; .*k4: why\. Repair"):
        budgets[0].check(20, 128)
    with pytest.raises(ValueError, match=r"20 of 128 samples .* None was on this rank: the logs of the others"):
        budgets[1].check(20, 128)


def test_what_is_kept_and_logged_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    budget = BadBudget(1.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            budget.add(LoadStats(2000, bad(MAX_LOGGED // 2 + 1)))
    assert budget.bad == 3 * (MAX_LOGGED // 2 + 1)
    assert len(budget.first) == KEYS_NAMED
    assert sum("skipped sample" in message for message in caplog.messages) == MAX_LOGGED
    assert sum("not logged" in message for message in caplog.messages) == 1
