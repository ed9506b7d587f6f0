"""The benchmark of saves: the saved bytes, the disk accesses, and the ratios."""

from pathlib import Path

import pytest

from benchmarks.checkpoint import Point, bytes_of, measure, state_of, summary, write_zeros
from benchmarks.common.forked import on_ranks


def test_the_state_has_the_bytes_asked_for_or_up_to_a_layer_more() -> None:
    # A layer: 16 512^2 + 4 512^2 + 8 512 numbers, 4 bytes each, and two moments.
    layer = 3 * 4 * (20 * 512**2 + 8 * 512)
    assert bytes_of(state_of(layer + 1, 0, 1)) == 2 * layer
    assert [bytes_of(state_of(layer, rank, 2)) for rank in range(2)] == [layer // 2] * 2


@pytest.mark.parametrize("dd", ["/usr/bin/dd", None])
def test_the_disk_is_given_as_many_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dd: str | None) -> None:
    if dd is None or not Path(dd).exists():
        monkeypatch.setattr("benchmarks.checkpoint.shutil.which", lambda name: None)
    nbytes = (16 << 20) + 12345  # no multiple of what is written at once
    write_zeros(tmp_path / "zeros", nbytes)
    assert (tmp_path / "zeros").stat().st_size == nbytes


def test_the_ratios_are_of_the_worst_point() -> None:
    fast = Point(1, 100, copy=0.2, slowed=0.025, dd=1.0, captured=0.04, waited=0.06, whole=1.1, sync=1.25,
                 torch_save=2.5, products=0.9)  # fmt: skip
    slow = Point(2, 100, copy=0.32, slowed=0.12, dd=1.0, captured=0.2, waited=0.0, whole=1.6, sync=1.6,
                 torch_save=1.6, products=0.8)  # fmt: skip
    found = summary([fast, slow])
    assert found["blocking_vs_sync"] == 0.125  # 0.2 / 1.6, and 0.1 / 1.25 = 0.08
    assert found["cost_vs_sync"] == 0.2  # 0.32 / 1.6, and 0.125 / 1.25 = 0.1
    assert found["copy_vs_sync"] == 0.2  # 0.32 / 1.6, and 0.16
    assert found["vs_disk"] == 0.625  # 1.0 / 1.6, and 0.8
    assert found["vs_torch_save"] == 0.125  # 0.2 / 1.6, and 0.04
    assert found["sync_vs_torch_save"] == 1.0


def test_two_ranks_save_in_turns_and_leave_nothing(tmp_path: Path) -> None:
    point = on_ranks(2, measure, 1, 1, tmp_path, timeout=60.0)
    assert point.ranks == 2 and point.nbytes == bytes_of(state_of(1, 0, 1))
    assert (
        0 < point.stopped < point.whole
        and min(point.copy, point.dd, point.sync, point.torch_save, point.products) > 0
    )
    assert list(tmp_path.iterdir()) == []
