"""A short run of what `make chaos` does at length."""

from collections import Counter
from pathlib import Path

import pytest

from tests.chaos import ledger
from tests.chaos.run import chaos


@pytest.mark.timeout(240)
def test_a_run_of_streams_and_remote_shards_that_is_killed_again_and_again_ends_like_one_that_is_not(
    tmp_path: Path,
) -> None:
    report = chaos(tmp_path, kills=4, steps=15, ranks=2, seed=2, streams=True, remote=True)  # resumes at 3 and 6
    assert report.passed, report
    assert report.kills >= 2, report  # on a slow machine the clock may come too late for some


def test_the_ledger_sees_lost_and_repeated_samples(tmp_path: Path) -> None:
    (tmp_path / "ledger_0.jsonl").write_text(
        '{"step": 1, "samples": [1, 2]}\n{"step": 2, "samples": [3, 4]}\n{"step": 2, "samples": [3, 3]}\n{"st'
    )
    found = ledger.history(tmp_path)
    assert ledger.compare(found, found) == (0, 0)
    wanted = {1: found[1], 2: Counter([3, 4]), 3: Counter([5])}
    assert ledger.compare(found, wanted) == (2, 1)
