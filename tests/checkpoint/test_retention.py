"""Which checkpoints are deleted; the kept ones always suffice to resume."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.folders import Retention, to_delete
from mmmoe_pretrain.checkpoint.names import Checkpoint, folder_name
from tests.checkpoint.support import small_state


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
def test_what_stays(retention: Retention, metrics: dict[int, float | None], kept: list[int]) -> None:
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


def steps_in(root: Path) -> list[int]:
    return [c.step for c in store.checkpoints(root)]


def test_a_run_keeps_its_best_and_its_last(tmp_path: Path) -> None:
    for step, metric in [(10, 2.0), (20, 1.0), (30, 3.0), (40, None), (50, 4.0)]:
        store.save(tmp_path, step, small_state(), {}, None, Retention(last=1, best=1), metric)
    assert steps_in(tmp_path) == [20, 50]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000020", "step_00000050"]


def test_a_rollback_deletes_later_checkpoints(tmp_path: Path) -> None:
    first, *_ = [store.save(tmp_path, step, small_state(), {}, None, Retention(last=3)) for step in (10, 20, 30)]
    store.rewind(first)
    assert store.find_latest(tmp_path) == first
    assert steps_in(tmp_path) == [10]


def test_a_save_before_abandoned_later_ones_is_the_latest_and_stays(tmp_path: Path) -> None:
    for step in (10, 40, 20):  # 40 was left there by a run that went back without saying so
        store.save(tmp_path, step, small_state(), {}, None, Retention(last=1))
    latest = store.find_latest(tmp_path)
    assert latest is not None and latest.step == 20
    assert steps_in(tmp_path) == [20, 40]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store.save(tmp_path, 10, small_state(), {"time": 1}, None, Retention())
    again = store.save(tmp_path, 10, small_state(), {"time": 2}, None, Retention())
    assert store.read_meta(again)["time"] == 2
    store.verify(again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_00000010"]
