"""docs/add_a_modality.md: its commands run, and its quoted lines are in the quoted files."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add_a_modality.md").read_text(encoding="utf-8")
SERIES = (ROOT / "mmmoe_pretrain" / "modalities" / "series.py").read_text(encoding="utf-8")
MORE = {  # of the commands: no network, and few steps
    "examples/sensors.py": ["--synthetic"],
    "train": ["train.steps=40", "train.log_every=5", "data.num_workers=0"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("quoted", blocks("python"))
def test_the_page_quotes_the_file(quoted: str) -> None:
    assert quoted in SERIES


def test_the_commands_of_the_page_train_and_evaluate(tmp_path: Path) -> None:
    for folder in ("configs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (commands,) = blocks("sh")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        modules = {
            "mmmoe": ["-m", "mmmoe_pretrain.cli"],
            "mmmoe-data": ["-m", "mmmoe_pretrain.data_prep.cli"],
            "python": [],
        }
        more = next((extra for word, extra in MORE.items() if word in arguments), [])
        subprocess.run(
            [sys.executable, *modules[program], *arguments, *more],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            timeout=120,
        )
    records = [json.loads(line) for line in (tmp_path / "runs/sensors/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["losses"]["total"] < records[0]["losses"]["total"]
    assert "motion" in (tmp_path / "runs/sensors/report.md").read_text()
