"""A run goes on as one that has more: what it had is the same, what is new begins as in a new run."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmmoe_pretrain import cli
from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.state import WholeState, model_key, optimizer_key
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.surgery.extend import Estimate, Experts, _refuse_other_inputs, extend
from mmmoe_pretrain.surgery.operation import operate
from mmmoe_pretrain.surgery.split import split
from mmmoe_pretrain.train.loop import train
from tests.distributed import run_ranks
from tests.export.support import make_run
from tests.support import tiny_config

UP, ROUTER = "mmmoe.trunk.blocks.1.ffn.experts.up", "mmmoe.trunk.blocks.1.ffn.router.weight"
IMAGE = {"kind": "image", "size": 16, "stem_channels": 8}
TEXT = {"kind": "text", "max_tokens": 16}
OLD: dict[str, Any] = {
    "modalities": {"image": IMAGE, "text": TEXT},
    "objectives": {"pairs": {"kind": "contrastive", "pairs": {"image-text": 1.0}}},
    "train": {"steps": 2, "global_batch_size": 16, "log_every": 1},
}
HEARD = (
    "modalities.audio={kind: audio, max_seconds: 0.4, stem_channels: 8}",
    "objectives.heard={kind: contrastive, pairs: {audio-text: 1.0}}",
)
SMALL = Estimate(samples=12, batch_size=4)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> RunConfig:
    """A run of images and texts at step 7."""
    return make_run(tmp_path_factory.mktemp("old"), tiny_data, (7,), **OLD)[0]


def state_of(folder: Path) -> WholeState:
    checkpoint = store.find_latest(folder / "checkpoints")
    assert checkpoint is not None
    return store.read_state(checkpoint)


def test_a_modality_an_objective_and_experts_are_added_and_the_run_trains(
    old: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "more"
    monkeypatch.setattr(sys, "argv", ["mmmoe", "extend", str(old.run_dir), "--out", str(new), *HEARD,
                                      "--add-experts", "2", "--wake-steps", "4"])  # fmt: skip
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "the function is preserved" in said and "at step 0 of 2; train it with: mmmoe train" in said
    config = run_config.load(new / "config.yaml")
    assert (config.run_dir, config.moe.num_experts, [*config.modalities]) == (new, 6, ["image", "text", "audio"])
    before, after = state_of(old.run_dir), state_of(new)
    fresh = {model_key(name): value.detach() for name, value in PretrainingModel(config).named_parameters()}
    added = {key for key in after if key.startswith("model/")} - before.keys()
    assert any(".embedders.audio." in key for key in added) and any("joint_heads.audio" in key for key in added)
    for key, value in after.items():
        if key.startswith("optimizer/"):
            assert not value.any(), key
        elif key in before and before[key].shape == value.shape:
            assert torch.equal(value, before[key]), key
        elif key in before:
            assert torch.equal(value[:4], before[key]), key
        elif not key.endswith("router.dormancy"):
            assert torch.equal(value, fresh[key]), key
    record = json.loads((new / "surgery.json").read_text())
    assert {model_key(name) for name in record["added"]} == added
    run_ranks(1, train, config, True)
    assert [json.loads(line)["step"] for line in (new / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_what_would_be_lost_or_has_another_shape_is_refused_by_name(old: RunConfig, tmp_path: Path) -> None:
    other = ["objectives={captions: {kind: next_token, parts: [image, text]}}"]
    for message, overrides, dropped in (
        (r"has no mmmoe.joint_heads.image.weight, .* with --drop mmmoe.joint_heads.image", other, []),
        (r"--drop mmmoe.banks: nothing of this name would be lost", other, ["mmmoe.banks"]),
        (r"router.weight has the shape \[4, 16\] .* --add-experts N", ["moe.num_experts=6"], []),
        (r"the overrides change modalities.image", ["modalities.image.mean=0.1"], []),
        (r"joint_heads.image.weight has the shape \[8, 16\] .* \[4, 16\]", ["model.embedding_size=4"], []),
        (r"extend did not preserve the function", ["moe.experts_per_token=1"], []),
    ):
        with pytest.raises(ValueError, match=message):
            extend(old.run_dir, tmp_path / "refused", overrides, dropped=dropped)
        assert not (tmp_path / "refused").exists()
    lines = extend(old.run_dir, tmp_path / "kept", other, dropped=["mmmoe.joint_heads", "tasks.pairs"])
    assert "dropped: mmmoe.joint_heads.image.weight, mmmoe.joint_heads.text.weight, tasks.pairs" in lines[2]
    assert model_key("mmmoe.language_head.weight") in state_of(tmp_path / "kept")


@pytest.mark.parametrize("change", [{"of": "text"}, {"classes": ["b", "a"]}])
def test_a_class_head_keeps_its_classes_and_what_it_reads(tmp_path: Path, change: dict[str, Any]) -> None:
    """Its weights would have the same shape, and another meaning."""
    pairs, kind = OLD["objectives"], {"kind": "classify", "of": "image", "classes": ["a", "b"]}
    old, same, other = (
        tiny_config(tmp_path, objectives={**pairs, "digit": {**kind, **its}})
        for its in ({}, {"label_smoothing": 0.1}, change)
    )
    _refuse_other_inputs(old, same)
    with pytest.raises(ValueError, match=r"of or classes of objectives.digit, by which .* of another name"):
        _refuse_other_inputs(old, other)


def test_the_run_is_the_anchor_and_what_is_new_has_no_importance(old: RunConfig, tmp_path: Path) -> None:
    hold = "optimizer.hold={strength: 1.0, importance: uniform}"
    extend(old.run_dir, tmp_path / "uniform", [hold, "optimizer.average=1.0", *HEARD], Experts(1))
    state, before = state_of(tmp_path / "uniform"), state_of(old.run_dir)
    names = [
        key.removeprefix("model/") for key in state if optimizer_key(key.removeprefix("model/"), "anchor") in state
    ]
    for name in names:
        assert torch.equal(state[optimizer_key(name, "anchor")], state[model_key(name)]), name
        assert torch.equal(state[optimizer_key(name, "average")], state[model_key(name)]), name
        importance = state[optimizer_key(name, "importance")]
        grown = model_key(name) in before and before[model_key(name)].shape != importance.shape
        expected = torch.full_like(importance, model_key(name) in before)
        expected[4:] *= not grown
        assert torch.equal(importance, expected), name
    assert {UP, ROUTER} <= {*names}
    config = run_config.load(tmp_path / "uniform" / "config.yaml")
    with pytest.raises(ValueError, match=r"keeps exp_avg.* optimizer.hold, which mmmoe extend can change"):
        operate(config.run_dir, tmp_path / "x", ["optimizer.hold=null"], "split", lambda its: split(its, 2, False))


def test_importance_by_the_fisher_information_adds_up_over_runs(old: RunConfig, tmp_path: Path) -> None:
    hold = "optimizer.hold={strength: 1.0, kept: 0.5}"
    extend(old.run_dir, tmp_path / "one", [hold], estimate=SMALL)
    extend(tmp_path / "one", tmp_path / "two", [], Experts(2), estimate=SMALL)
    one, two = (
        {key.split("/")[1]: its for key, its in state_of(tmp_path / run).items() if key.endswith("/importance")}
        for run in ("one", "two")
    )
    mean = sum(float(its.sum()) for its in one.values()) / sum(its.numel() for its in one.values())
    assert mean == pytest.approx(1.0, rel=1e-4)
    assert all((its >= 0).all() for its in one.values()) and one[UP].any()
    for name, its in one.items():  # the same weights and data, so the same information, and half of what was there
        torch.testing.assert_close(two[name][: len(its)] if its.ndim else two[name], 1.5 * its)
    assert not two[UP][4:].any() and not two[ROUTER][4:].any()


def test_a_new_run_has_nothing_that_it_could_be_held_to(old: RunConfig, tmp_path: Path) -> None:
    values = old.model_dump(mode="json") | {"name": "fresh", "runs_dir": str(tmp_path)}
    values["optimizer"]["hold"] = {"strength": 1.0}
    with pytest.raises(AssertionError, match=r"starts from step 0 without one; make it with mmmoe extend RUN"):
        run_ranks(1, train, run_config.parse(values))
