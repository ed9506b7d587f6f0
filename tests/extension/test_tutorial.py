"""docs/add_a_modality.md: its commands run, and its quoted lines are in the quoted files."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from mmmoe_pretrain import cli
from mmmoe_pretrain.data_prep import cli as data_cli
from tests import distributed as _imports  # noqa: F401 - what runs import, once and not in each fork
from tests.support import in_forks

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


def call(folder: Path, program: str, arguments: list[str]) -> None:
    """As in a shell in ``folder``."""
    os.chdir(folder)
    torch.set_num_threads(1)
    if program == "python":
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        sys.argv = [program, *arguments]
        {"mmmoe": cli.main, "mmmoe-data": data_cli.main}[program]()


def test_the_commands_of_the_page_train_and_evaluate(tmp_path: Path) -> None:
    for folder in ("configs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (commands,) = blocks("sh")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        more = next((extra for word, extra in MORE.items() if word in arguments), [])
        assert in_forks(partial(call, tmp_path, program, [*arguments, *more]), seconds=110) == [0], line
    records = [json.loads(line) for line in (tmp_path / "runs/sensors/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["losses"]["total"] < records[0]["losses"]["total"]
    assert "motion" in (tmp_path / "runs/sensors/report.md").read_text()
