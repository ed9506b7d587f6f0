"""Runs that are not of mmmoe train alone: of two towers, and of an upcycled model."""

from __future__ import annotations

from pathlib import Path

import pytest

from evidence import records
from evidence.__main__ import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_towers_and_an_upcycled_model_are_trained_and_recorded(tmp_path: Path) -> None:
    main(["--quick", "--out", str(tmp_path), "--only", "limoe", "upcycling", "--variants", "towers", "upcycled",
          "--seeds", "1"])  # fmt: skip
    towers = records.read(records.path_of("limoe", "towers", 1, tmp_path / "records"))
    assert towers.load == [] and towers.parameters > towers.active_parameters
    grown = records.read(records.path_of("upcycling", "upcycled", 1, tmp_path / "records"))
    assert 0 < grown.before_tokens < grown.points[0].tokens
    assert {len(load) for layer in grown.load for load in layer.values()} == {16}
    main(["--quick", "--out", str(tmp_path), "--only", "limoe", "upcycling", "--list"])
