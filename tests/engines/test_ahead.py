"""Microbatches are copied to the device one ahead of the one that is computed on."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.engines.ahead import CopiedAhead, copy_stream

CPU = torch.device("cpu")


class Recorded:
    """Stands for a batch: notes when it is copied."""

    def __init__(self, number: int, log: list[str], fails: bool = False) -> None:
        self.number, self._log, self._fails = number, log, fails

    def to(self, device: torch.device) -> Recorded:
        if self._fails:
            raise RuntimeError(f"no memory for batch {self.number}")
        self._log.append(f"copy {self.number}")
        return self


def copied(log: list[str], fails: int | None = None) -> CopiedAhead:
    batches: list[Any] = [Recorded(number, log, number == fails) for number in range(3)]
    return CopiedAhead(cast(list[Batch], batches), CPU, copy_stream(CPU))


def numbers_of(batches: CopiedAhead, log: list[str], ahead: bool) -> None:
    for batch in batches:
        log.append(f"use {cast(Any, batch).number}")
        for _ in range(2 * ahead):  # the second call finds one ahead already
            batches.copy_next()


def test_at_most_one_batch_is_ahead_and_each_comes_once_in_order() -> None:
    log: list[str] = []
    numbers_of(copied(log), log, ahead=True)
    assert log == ["copy 0", "use 0", "copy 1", "use 1", "copy 2", "use 2"]


def test_what_was_not_copied_ahead_is_copied_when_it_is_needed() -> None:
    log: list[str] = []
    batches = copied(log)
    numbers_of(batches, log, ahead=False)
    assert log == ["copy 0", "use 0", "copy 1", "use 1", "copy 2", "use 2"]
    with pytest.raises(StopIteration):
        next(batches)


def test_an_error_of_a_copy_is_raised_and_loses_no_batch_before() -> None:
    log: list[str] = []
    batches = copied(log, fails=1)
    assert cast(Any, next(batches)).number == 0
    with pytest.raises(RuntimeError, match="no memory for batch 1"):
        batches.copy_next()
