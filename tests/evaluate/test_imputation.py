"""Scores where a modality is missing: every way on a random model, and the bank against loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.batch import SampleMeta
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.state import model_key
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.evaluate import run
from mmmoe_pretrain.evaluate.features import HeldOut
from mmmoe_pretrain.evaluate.imputation import Bank, Case
from mmmoe_pretrain.evaluate.report import Report
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import things, tiny_config, write_shards, write_tokenizer

COMPLETE = {"kind": "completion", "source": "image", "target": "scene", "hidden_size": 12}
WAYS = ("", "_neighbours", "_by_complete", "_present")
TESTED = 7  # held-out rows, of which the last two have no audio


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("imputation")
    write_shards(root / "train", things(20)[8:])
    rows = things(TESTED)
    write_shards(root / "test" / "whole", rows[:5])
    write_shards(root / "test" / "mute", rows[5:], lacking=("audio",))
    write_tokenizer(root / "tokens.model")
    return tiny_config(
        root,
        representations={"scene": {"kind": "late", "parts": ["image", "audio"], "missing": "allow"}},
        objectives={"pairs": {"kind": "contrastive", "pairs": {"scene-text": 1.0, "scene-image": 1.0}},
                    "complete": COMPLETE},
        evaluate={"test": [str(root / "test" / part) for part in ("whole", "mute")],
                  "impute": {"scene": {"observed": "image", "neighbours": 3}}},
    )  # fmt: skip


def evaluated(monkeypatch: pytest.MonkeyPatch, folder: Path, config: RunConfig, **sections: Any) -> Report:
    """The report of a random model, whose objectives have a checkpoint."""
    config = config.model_copy(update={"name": "tiny", **sections})
    model = PretrainingModel(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {model_key(f"tasks.{name}"): p.detach() for name, p in model.tasks.named_parameters()}
    store.write_state(folder / "checkpoints", 7, state, {})
    monkeypatch.setattr(run, "load_model", lambda *_: (model.mmmoe.eval(), config, 7))
    return run.evaluate(folder)


def test_every_way_is_scored_on_the_rows_that_have_all(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {row["metric"]: row for row in (report := evaluated(monkeypatch, tmp_path, config)).results}
    found = {name: row for name, row in rows.items() if name.startswith("scene_given_image")}
    ways = [f"scene_given_image{way}" for way in WAYS]
    # Nothing is compared with the image, which the query has, and the true vector not with itself.
    assert found.keys() == {
        *(f"{way}_to_text_r{k}" for way in ways for k in (1, 10)),
        *(f"{way}_to_scene_r{k}" for way in ways[:3] for k in (1, 10)),
        *(f"{way}_cosine" for way in ways[:3]),
    }
    assert {row["n"] for row in found.values()} == {5}
    assert all(row["candidates"] == 5 for name, row in found.items() if "_r1" in name)
    assert rows["scene_to_text_r1"]["n"] == TESTED
    cosines = [found[f"{way}_cosine"] for way in ways[:3]]
    assert all(row["unit"] == "cosine" and -1 <= row["value"] < 1 and row["majority"] < 1 for row in cosines)
    assert len({row["value"] for row in cosines}) == 3
    assert [note for note in report.notes if note.startswith("scene_given_image")] == [
        "scene_given_image: what stands in for scene where only image is given, of rows with image and scene; "
        "_neighbours: the mean of the 3 nearest of 12 training samples"
    ]
    without = config.evaluate.model_copy(update={"impute": {}})
    plain = evaluated(monkeypatch, tmp_path / "plain", config, evaluate=without).results
    names = {row["metric"] for row in plain}
    assert {name for name in names if "given" in name} == {name for name in found if "neighbours" not in name}
    assert {row["metric"]: row for row in plain} == {name: rows[name] for name in names}
