"""The page and the numbers of ``make gpu``, with fake parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.common import gpu_report
from benchmarks.common.gpu_report import PARTS, ROOT, report

FINE = 'print("a table"); print(\'{"mfu": 0.5, "device": "some GPU", "torch": "2.x"}\')'


def test_a_part_that_fails_is_reported_and_the_others_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "GPU.md"
    status = report({"works": ("-c", FINE), "breaks": ("-c", "import sys; print('why'); sys.exit(3)")}, target)
    assert status == 1
    page = target.read_text()
    assert "some GPU, torch 2.x" in page
    assert "a table" in page
    assert '"mfu"' not in page  # figures stand in the JSON
    assert "## breaks\n\n**Failed with status 3.**" in page
    assert "why" in page
    figures = json.loads(target.with_suffix(".json").read_text())
    assert (figures["works"]["status"], figures["works"]["mfu"]) == (0, 0.5)
    assert figures["breaks"]["status"] == 3


def test_a_part_that_hangs_ends_with_what_it_printed(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(gpu_report, "SECONDS", 1)
    outcome = gpu_report.run_part("hangs", ("-u", "-c", "print('begun', flush=True); import time; time.sleep(60)"))
    assert outcome.status == 124
    assert outcome.output.startswith("begun")


def test_every_part_is_there() -> None:
    for arguments in PARTS.values():
        files = [argument for argument in arguments if argument.startswith(("tests/", "benchmarks/"))]
        assert files
        assert all((ROOT / file).exists() for file in files)


def test_without_a_gpu_nothing_is_run_or_written(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu_report", "--write", str(tmp_path / "GPU.md")])
    with pytest.raises(SystemExit, match="make gpu needs a GPU"):
        gpu_report.main()
    assert not list(tmp_path.iterdir())
