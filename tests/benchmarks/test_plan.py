"""Planned peaks beside those of real steps, for two of the benchmark's layouts; nothing is timed."""

from __future__ import annotations

import pytest

from benchmarks.planning import memory
from benchmarks.planning.layouts import CASES, MEMORY_QUICK
from mmmoe_pretrain.engines import deepspeed, megatron


def test_peaks_of_both_engines_are_planned_within_3_percent() -> None:
    megatron.prepare()  # before the fork: imports take seconds
    deepspeed.prepare()
    found = memory.compare([case for case in CASES if case.name in MEMORY_QUICK], steps=1)
    assert {row.case for row in found} == set(MEMORY_QUICK)
    for row in found:
        assert row.planned == pytest.approx(row.measured, rel=0.03), row
