"""examples/: their data are what their pages say, and their configs train on them."""

from __future__ import annotations

import json
import runpy
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.data.evaluation import iterate_eval
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import write_tokenizer

MEDICAL = Path(__file__).resolve().parents[2] / "examples" / "medical"


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("medical") / "phantoms")


def make(out: Path) -> Path:
    before, sys.argv = sys.argv, ["phantoms.py", "--out", str(out), "--share", "0.02"]
    try:
        runpy.run_path(str(MEDICAL / "phantoms.py"), run_name="__main__")
    finally:
        sys.argv = before
    write_tokenizer(out / "tokens.model")
    return out


def members(folder: Path) -> dict[str, dict[str, bytes]]:
    """By key and extension."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(folder / "00000.tar") as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            found.setdefault(key, {})[extension] = file.read()
    return found


def test_phantoms_are_the_same_each_time_and_views_and_reports_are_missing(phantoms: Path, tmp_path: Path) -> None:
    again = make(tmp_path / "again")
    assert all((again / name / "00000.tar").read_bytes() == (phantoms / name / "00000.tar").read_bytes()
               for name in ("train", "test", "test_side"))  # fmt: skip
    train, test = members(phantoms / "train"), members(phantoms / "test")
    assert {frozenset(one) & {"front.png", "side.png"} for one in train.values()} == {
        frozenset({"front.png", "side.png"}), frozenset({"front.png"}), frozenset({"side.png"}),
    }  # fmt: skip
    assert 0.1 < sum("txt" not in one for one in train.values()) / len(train) < 0.6
    assert all(set(one) == {"front.png", "side.png", "txt", "json"} for one in test.values())
    side = members(phantoms / "test_side")
    assert all("front.png" not in one and one["side.png"] == test[key]["side.png"] for key, one in side.items())


def test_a_report_says_the_finding(phantoms: Path) -> None:
    words = {
        "none": "no finding",
        "nodule": "nodule in the ",
        "fluid": "fluid in the ",
        "large_heart": "enlarged heart",
    }
    for one in members(phantoms / "test").values():
        assert one["txt"].decode().startswith(words[json.loads(one["json"])["finding"]])


def test_every_objective_of_the_medical_config_learns_from_the_phantoms(phantoms: Path) -> None:
    overrides = [f"data.train=[{{path: {phantoms / 'train'}}}]", f"data.tokenizer={phantoms / 'tokens.model'}"]
    config = run_config.load(MEDICAL / "config.yaml", overrides)
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    model = PretrainingModel(config.with_vocabulary(modalities.vocab_size))
    batch, _ = next(iterate_eval([phantoms / "train"], config, modalities, batch_size=60))
    loss, report = model(batch)
    loss.backward()
    assert set(model.objectives.losses) <= {name for name, value in report.losses.items() if float(value) > 0}
    gradient = model.mmmoe.embedders["side"].get_parameter(
        next(iter(dict(model.mmmoe.embedders["side"].named_parameters())))
    )
    assert gradient.grad is not None and torch.count_nonzero(gradient.grad)
