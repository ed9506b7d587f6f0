"""The benchmark of a whole run, on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.training import MODELS, measure


@pytest.mark.slow  # half a minute: six commands in processes of their own
def test_a_run_is_resumed_at_its_half_and_scored(tmp_path: Path) -> None:
    found = measure(tmp_path, "cpu")
    assert found["resumed_at"] == [MODELS["cpu"]["train"]["steps"] // 2]
    assert found["tokens_per_second"] > 0 and 0 <= found["data_stall"] <= 1 and found["save_seconds"] > 0
    assert found["scores"] > 0 and found["device"] == "cpu"
