"""Names of modalities and objectives are the user's: the package knows none, and renaming them changes no number."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain import kinds
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.evaluate.run import evaluate_command
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.support import objectives, things, tiny_values, write_shards, write_tokenizer

PACKAGE = Path(__file__).resolve().parents[2] / "mmmoe_pretrain"
MODALITY_NAMES = set(kinds.MODALITIES.builtin)
OBJECTIVE_NAMES = set(kinds.OBJECTIVES.builtin) | {"captioning"}
# Where names of kinds may stand: the kinds' own files, their table, and configs of earlier versions.
EXEMPT = (
    *(f"modalities/{kind}" for kind in kinds.MODALITIES.builtin),
    *(f"objectives/{kind}" for kind in kinds.OBJECTIVES.builtin),
    "kinds.py",
    "config/upgrade.py",
    "limits.py",
)
# A text is a str everywhere, and other libraries have attributes of these names.
IDENTIFIERS = MODALITY_NAMES - {"text"}
NEW_NAMES = {"image": "drawing", "audio": "sample_of_speech", "text": "words"}


def offending(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings that are a name or a pair of names, and attributes and identifiers that are one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parts = set(node.value.replace("-", "/").split("/"))
            if parts and parts <= MODALITY_NAMES | OBJECTIVE_NAMES:
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.Attribute) and node.attr in IDENTIFIERS | OBJECTIVE_NAMES:
            yield node.lineno, f".{node.attr}"
        elif isinstance(node, ast.Name) and node.id in IDENTIFIERS | OBJECTIVE_NAMES:
            yield node.lineno, node.id
        elif isinstance(node, ast.arg) and node.arg in IDENTIFIERS | OBJECTIVE_NAMES:
            yield node.lineno, node.arg


def test_the_package_knows_no_modality_or_objective_by_name() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {what}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if not str(path.relative_to(PACKAGE)).startswith(EXEMPT)
        for line, what in offending(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("code", ['x = "image"', 'x = "audio-text"', "x.audio", "contrastive(1)", "def f(image): 0"])
def test_the_search_finds_a_name(code: str) -> None:
    assert list(offending(ast.parse(code)))


def config_of(root: Path, names: dict[str, str]) -> RunConfig:
    """A run whose modalities are called by ``names``."""
    values: dict[str, Any] = tiny_values(root, name="-".join(["run", *names.values()]).replace("_", "-"))
    values["modalities"] = {names[name]: its for name, its in values["modalities"].items()}
    sections = objectives(captioning={"parts": [[names["image"], names["audio"]], names["text"]]})
    pairs = {"-".join(names[m] for m in pair.split("-")): w for pair, w in sections["contrastive"]["pairs"].items()}
    sections["contrastive"]["pairs"] = pairs
    values["objectives"] = sections
    values["moe"]["losses"] |= {"min_experts": {names["image"]: 2.0}}
    values["train"] |= {"steps": 6, "log_every": 1}
    values["evaluate"] = {"keep_seen_texts": True}
    return run_config.parse(values)


def test_renamed_modalities_train_save_evaluate_and_report_the_same_numbers(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", things(48))
    held_out = [{**row, "name": f"number {row['name']}"} for row in things(16)]  # texts that are not trained on
    write_shards(tmp_path / "test", held_out)
    write_tokenizer(tmp_path / "tokens.model")
    found = []
    for names in ({name: name for name in NEW_NAMES}, NEW_NAMES):
        config = config_of(tmp_path, names)
        run_ranks(1, train, config)
        evaluate_command(config.run_dir, [str(tmp_path / "test")], None, None, [])
        logged = (config.run_dir / "metrics.jsonl").read_text()
        report = (config.run_dir / "report.json").read_text()
        for old, new in names.items():
            logged, report = (text.replace(new, f"<{old}>") for text in (logged, report))
        found.append(([json.loads(line)["losses"] for line in logged.splitlines()], json.loads(report)))
    (losses, report), (renamed_losses, renamed_report) = found
    assert len(losses) == 6
    for before, after in zip(losses, renamed_losses, strict=True):
        assert before.keys() == after.keys()
        np.testing.assert_allclose(list(after.values()), list(before.values()), rtol=1e-4, atol=1e-6)
    assert scores(renamed_report) == pytest.approx(scores(report), rel=1e-3, abs=1e-3)


def scores(report: dict[str, Any]) -> dict[str, float]:
    """Every number of a report by its path, without times."""
    found: dict[str, float] = {}

    def visit(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                visit(child, f"{path}/{key}")
        elif isinstance(value, list):
            for number, child in enumerate(value):
                visit(child, f"{path}/{number}")
        elif isinstance(value, int | float) and "second" not in path:
            found[path] = float(value)

    visit(report, "")
    return found
