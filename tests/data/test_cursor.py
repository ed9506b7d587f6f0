"""Which batch a step reads, after any history of skipped windows."""

from __future__ import annotations

import json
from itertools import count, islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmmoe_pretrain.data.cursor import LAST_BATCH, MAX_WINDOWS, Cursor

windows = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)).map(lambda w: (w[0], w[0] + w[1])), max_size=8)


def left(skipped: list[tuple[int, int]], steps: int) -> list[int]:
    """The batches of the first steps, by trying every number."""
    return list(islice((b for b in count() if not any(first <= b < end for first, end in skipped)), steps))


@settings(deadline=None)
@given(windows)
def test_step_i_reads_the_ith_number_outside_of_the_windows(skipped: list[tuple[int, int]]) -> None:
    cursor = Cursor(tuple(skipped))
    assert [cursor.batch(step) for step in range(60)] == left(skipped, 60)


@settings(deadline=None)
@given(windows, st.integers(0, 30), st.integers(0, 80), st.integers(1, 10))
def test_skipping_leaves_trained_steps_alone_and_loses_no_other_batch(
    skipped: list[tuple[int, int]], step: int, first: int, size: int
) -> None:
    before = Cursor(tuple(skipped))
    after = before.skip(first, first + size, step=step)
    trained = [before.batch(i) for i in range(step)]
    assert [after.batch(i) for i in range(step)] == trained
    wanted = [b for b in left(skipped, 150) if b in trained or not first <= b < first + size]
    assert [after.batch(i) for i in range(100)] == wanted[:100]


def test_the_cursor_survives_json_and_windows_that_overlap_or_touch_are_one() -> None:
    cursor = Cursor(((7, 9), (1, 3), (2, 4), (4, 5), (1, 2)))
    assert json.dumps(cursor.to_json()) == "[[1, 5], [7, 9]]"
    assert Cursor.from_json(json.loads(json.dumps(cursor.to_json()))) == cursor
    assert Cursor.from_json([]) == Cursor()


@pytest.mark.parametrize("value", [
    None, {}, "[]", 3, [3], [[1]], [[1, 2, 3]], [["1", "2"]], [[1.0, 2.0]], [[True, 2]], [[-1, 2]], [[2, 2]],
    [[3, 1]],    [[0, LAST_BATCH + 1]], [[0, None]], [[[0], 1]], [(1, 2)], [[0, 1]] * (MAX_WINDOWS + 1),
])  # fmt: skip
def test_what_is_no_list_of_windows_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"windows? of skipped batches|skipped batches must be"):
        Cursor.from_json(value)
