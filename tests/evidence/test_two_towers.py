"""Two dense towers, compared with one dense trunk of the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evidence.runs import _parameters
from evidence.study import TOWERS, TRAINER
from evidence.two_towers import Towers
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models import mmmoe
from mmmoe_pretrain.models.pretraining import PretrainingModel
from tests.support import random_batch, tiny_config

NAMES = ("image", "text")
DENSE = {"num_experts": 1, "experts_per_token": 1, "every": 1, "expert_hidden_size": 16}
MODALITIES = {"image": {"kind": "image", "size": 16, "stem_channels": 8}, "text": {"kind": "text", "max_tokens": 16}}
PAIRS = {"pairs": {"kind": "contrastive", "pairs": {"image-text": 1.0}}}


def config(**sections: object) -> RunConfig:
    return tiny_config(Path("unused"), **{"modalities": MODALITIES, "objectives": PAIRS, "moe": DENSE, **sections})


def towers(run: RunConfig, monkeypatch: pytest.MonkeyPatch) -> PretrainingModel:
    with monkeypatch.context() as patch:
        patch.setattr(mmmoe, "Trunk", Towers)
        return PretrainingModel(run)


@pytest.mark.parametrize("modalities", [["it", "it", "i", "t", "it"], ["t", "t"], []])
def test_towers_of_equal_weights_are_one_dense_trunk(modalities: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = config()
    one, two = PretrainingModel(run), towers(run, monkeypatch)
    shared = dict(one.named_parameters())
    trunk = {name.removeprefix("mmmoe.trunk."): p for name, p in shared.items() if ".trunk." in name}
    copies = {f"mmmoe.trunk.towers.{m}.{name}": p for m in NAMES for name, p in trunk.items()}
    state = {name: p for name, p in shared.items() if ".trunk." not in name} | copies
    assert state.keys() == dict(two.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in two.named_parameters():
            parameter.copy_(state[name])
    batch = random_batch(run, modalities)
    outputs = []
    for model in (one, two):
        outputs.append(model.mmmoe(batch)[0])
        (outputs[-1].hidden_nD.sin().sum() + model(batch)[0]).backward()
    # The same products over other numbers of rows: fp32 rounding only.
    torch.testing.assert_close(outputs[0].hidden_nD, outputs[1].hidden_nD, rtol=1e-5, atol=1e-5)
    grads = {name: p.grad for name, p in two.named_parameters()}
    for name, parameter in trunk.items():
        of_towers = [grads[f"mmmoe.trunk.towers.{m}.{name}"] for m in NAMES]
        assert all(grad is not None for grad in of_towers)
        torch.testing.assert_close(sum(of_towers), parameter.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in shared.items():
        if ".trunk." not in name:
            torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_each_token_meets_the_weights_of_its_modality_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = towers(config(), monkeypatch)
    batch = random_batch(config(), ["it", "it"])
    before = model.mmmoe(batch)[0].features
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".towers.image." in name:
                parameter.mul_(2)
    after = model.mmmoe(batch)[0].features
    torch.testing.assert_close(before["text"], after["text"], rtol=0, atol=0)
    assert not torch.allclose(before["image"], after["image"])


def test_parameters_of_towers_are_counted_as_they_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    run = config()
    built = sum(parameter.numel() for parameter in towers(run, monkeypatch).parameters())
    total, active = _parameters(run, TOWERS)
    assert total == built
    assert active == _parameters(run, TRAINER)[0]


def test_towers_refuse_experts_and_segments_of_two_modalities(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"moe.num_experts is 4; set it to 1"):
        towers(config(moe={"num_experts": 4}), monkeypatch)
    captions = {"captions": {"kind": "next_token", "parts": ["image", "text"]}}
    run = config(objectives=captions)
    with pytest.raises(ValueError, match="tokens of two modalities"):
        towers(run, monkeypatch)(random_batch(run, ["it"]))
