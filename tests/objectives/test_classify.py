"""Classification: the loss against numpy, which samples count, accuracy by hand, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.batch import Batch, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.evaluate.features import HeldOut
from mmmoe_pretrain.evaluate.scores import class_scores
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives.classify import ClassifySettings
from tests.support import objectives, pack_settings, random_sample, tiny_config

LABELS = ("cat", "dog", "cow", "cat", "", "dog")  # cow is no class; the last sample has no image
COUNTED = [0, 1, 3]


def config_with(**settings: Any) -> RunConfig:
    kinds = {"kind": "classify", "of": "image", "classes": ["dog", "cat", "hen"], **settings}
    return tiny_config(Path("unused"), objectives={**objectives(), "animals": kinds})


def batch_of(config: RunConfig, labels: tuple[str, ...] = LABELS) -> Batch:
    samples = [random_sample(i, "t" if i == 5 else "it", config) for i in range(len(labels))]
    named = zip(samples, labels, strict=True)
    samples = [dataclasses.replace(each, meta=dataclasses.replace(each.meta, label=its)) for each, its in named]
    return pack(samples, pack_settings(config))


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_the_loss_against_numpy(smoothing: float) -> None:
    config = config_with(label_smoothing=smoothing)
    batch, model = batch_of(config), PretrainingModel(config)
    outputs, _ = model.mmmoe(batch)
    head = model.mmmoe.class_heads["animals"]
    with torch.no_grad():
        head.bias.copy_(torch.tensor([0.5, -0.5, 0.0]))
    x = outputs.projected["image"].detach().double().numpy()
    logits = x @ head.weight.detach().double().numpy().T + np.array([0.5, -0.5, 0.0])
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    true = {0: 1, 1: 0, 3: 1}
    expected = np.mean(
        [-(1 - smoothing) * log_p[row, label] - smoothing * log_p[row].mean() for row, label in true.items()]
    )
    loss, report = model(batch)
    assert float(report.losses["animals"]) == pytest.approx(expected, rel=1e-5)  # fp32
    assert model.objectives["animals"].counts(batch) == {"animals": 3}
    loss.backward()
    assert head.weight.grad is not None and head.weight.grad[2].any()  # the absent class loses probability


def test_numbers_are_classes_and_a_number_of_them_too() -> None:
    assert ClassifySettings(kind="classify", of="image", classes=3).names == ("0", "1", "2")
    listed = ClassifySettings.model_validate({"kind": "classify", "of": "image", "classes": [7, 10]})
    assert listed.names == ("7", "10")
    with pytest.raises(ValueError, match="classes has True, which is no text; write it in quotes"):
        ClassifySettings.model_validate({"kind": "classify", "of": "image", "classes": [True, False]})


def test_without_labels_every_parameter_has_a_gradient_of_zeros() -> None:
    config = config_with()
    model = PretrainingModel(config)
    loss, report = model(batch_of(config, ("", "cow")))
    loss.backward()
    assert float(report.losses["animals"]) == 0.0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not model.mmmoe.class_heads["animals"].weight.grad.any()  # type: ignore[union-attr]


def test_accuracy_counts_each_item_once() -> None:
    """Four items: three of class a, of which two are right, and one of b, which is wrong; a row repeats the first
    item, and one has no class."""
    labels = ("a", "a", "a", "b", "a", "c")
    content = ("1", "2", "3", "4", "1", "5")
    logits = np.array([[2.0, 1], [0, 1], [3, 0], [1, 0], [2, 1], [0, 1]])
    data = HeldOut(
        metas=tuple(SampleMeta(str(i), label=label) for i, label in enumerate(labels)),
        texts=("",) * 6,
        content={"image": content},
        features={},
        predicted={},
        routing=(),
        class_logits={"task": logits},
    )
    settings = ClassifySettings(kind="classify", of="image", classes=("a", "b"))
    scores, notes = class_scores(data, "task", "image", settings)
    found = {score.metric: score for score in scores}
    assert found["task_accuracy"].value == pytest.approx(2 / 4) and found["task_accuracy"].n == 4
    assert found["task_accuracy_balanced"].value == pytest.approx((2 / 3 + 0) / 2)
    assert found["task_accuracy"].majority == pytest.approx(3 / 4) and not notes
    scores, notes = class_scores(data, "task", "image", settings.model_copy(update={"field": "subset"}))
    assert not scores and "no held-out row with image has a class of task in the field subset" in notes[0]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"of": "imge"}, "objectives.animals.of imge: there is no such representation; did you mean image"),
        ({"classes": ["a", "b", "a"]}, r"classes \['a', 'b', 'a'\] names 'a' twice; name every class once"),
        ({"classes": ["a"]}, "has fewer than two; name every class once, and two or more"),
        ({"classes": 1}, "classes 1: give a number from 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        config_with(**settings)
