"""Which global batch a training step reads: a pure function, saved as a handful of integers.

A run that rolls back to a checkpoint skips a *window* ``[first, end)`` of batches. Step i reads the i-th batch (from
0) outside of all windows, so no other batch is lost or repeated.
"""

from __future__ import annotations

from dataclasses import dataclass

LAST_BATCH = 1 << 40  # times a global batch of 4 million samples, positions still fit into int64
MAX_WINDOWS = 10_000  # of which a step's batch is found by a walk

Window = tuple[int, int]  # [first, end)


@dataclass(frozen=True)
class Cursor:
    """The batches of all steps, without those of ``skipped``: disjoint windows, ascending."""

    skipped: tuple[Window, ...] = ()

    def __post_init__(self) -> None:
        if len(self.skipped) > MAX_WINDOWS:
            raise ValueError(f"{len(self.skipped)} windows of skipped batches are more than {MAX_WINDOWS}")
        for window in self.skipped:
            _check(window)
        object.__setattr__(self, "skipped", _merge(self.skipped))

    def batch(self, step: int) -> int:
        """The global batch of ``step`` (the first is 0)."""
        batch = step
        for first, end in self.skipped:
            if first > batch:
                break
            batch += end - first
        return batch

    def skip(self, first: int, end: int, *, step: int) -> Cursor:
        """Skip the batches ``[first, end)`` from ``step`` on, where training resumes. Batches before it have been
        trained on: a window that begins among them is cut. Otherwise it would shift them, and later steps would lose
        as many unread batches.
        """
        first = max(first, self.batch(step))
        return Cursor((*self.skipped, (first, end))) if first < end else self

    def to_json(self) -> list[list[int]]:
        """``[[first, end], ...]``, ascending."""
        return [list(window) for window in self.skipped]

    @classmethod
    def from_json(cls, value: object) -> Cursor:
        """The cursor of ``[[first, end], ...]``. Raises ValueError for anything else."""
        if not isinstance(value, list) or not all(isinstance(window, list) for window in value):
            raise ValueError(f"skipped batches must be a list of [first, end], not {str(value)[:80]}")
        return cls(tuple(tuple(window) for window in value))


def _check(window: tuple[object, ...]) -> None:
    match window:
        case (int(first), int(end)) if bool not in (type(first), type(end)) and 0 <= first < end <= LAST_BATCH:
            return
    raise ValueError(
        f"a window of skipped batches must be two integers [first, end] with 0 <= first < end <= {LAST_BATCH}, "
        f"not {str(list(window))[:80]}; the checkpoint is damaged or was edited: use another one"
    )


def _merge(windows: tuple[Window, ...]) -> tuple[Window, ...]:
    merged: list[Window] = []
    for first, end in sorted(windows):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((first, end))
    return tuple(merged)
