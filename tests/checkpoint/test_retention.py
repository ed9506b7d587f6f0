"""Which checkpoints are deleted; the kept ones always suffice to resume."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.folders import Retention, to_delete
from mmmoe_pretrain.checkpoint.names import Checkpoint, folder_name
from tests.checkpoint.support import save


def at(*steps: int) -> list[Checkpoint]:
    return [Checkpoint("runs/demo", folder_name(step), step) for step in steps]


@pytest.mark.parametrize(
    ("retention", "metrics", "kept"),
    [
        (Retention(last=1), {}, [60]),
        (Retention(last=2), {}, [50, 60]),
        (Retention(last=9), {}, [10, 20, 30, 40, 50, 60]),
        (Retention(last=1, every=30), {}, [30, 60]),
        (Retention(last=1, best=1), {10: 3.0, 20: 1.0, 30: 2.0}, [20, 60]),
        (Retention(last=1, best=2), {10: 3.0, 20: 1.0, 30: 2.0}, [20, 30, 60]),
        (Retention(last=1, best=1), {20: 1.0, 40: 1.0}, [40, 60]),  # of equals the later
        (Retention(last=1, best=2), {10: math.nan, 20: None, 30: math.inf, 40: 5.0}, [40, 60]),
        (Retention(last=2, every=20, best=1), {10: 0.0}, [10, 20, 40, 50, 60]),
        (Retention(last=0), {}, [60]),  # never the newest
    ],
)
def test_which_checkpoints_are_kept(retention: Retention, metrics: dict[int, float | None], kept: list[int]) -> None:
    deleted = to_delete(at(30, 10, 20, 60, 40, 50), metrics, retention)
    assert [c.step for c in deleted] == [s for s in (10, 20, 30, 40, 50, 60) if s not in kept]


@given(
    st.sets(st.integers(0, 40), min_size=1),
    st.dictionaries(st.integers(0, 40), st.floats() | st.none()),
    st.builds(Retention, st.integers(0, 4), st.integers(0, 5), st.integers(0, 4)),
)
def test_the_newest_is_never_deleted_and_deleting_again_deletes_nothing(
    steps: set[int], metrics: dict[int, float | None], retention: Retention
) -> None:
    deleted = to_delete(at(*steps), metrics, retention)
    assert max(steps) not in {c.step for c in deleted}
    rest = [c for c in at(*steps) if c not in deleted]
    assert len(rest) >= min(len(steps), retention.last)
    assert to_delete(rest, metrics, retention) == []


def test_a_save_before_abandoned_later_ones_is_the_latest_and_stays(tmp_path: Path) -> None:
    for step in (10, 40, 20):  # 40 was left there by a run that went back without saying so
        save(tmp_path, step, keep=Retention(last=1))
    latest = store.find_latest(tmp_path)
    assert latest is not None and latest.step == 20
    assert [c.step for c in store.checkpoints(tmp_path)] == [20, 40]
