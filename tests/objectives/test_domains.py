"""Adaptation to a domain: moments against numpy, the classifier, reversed gradients, and which samples count."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives.moment_alignment import distance_of_moments
from tests.support import objectives, pack_settings, random_sample, tiny_config

SUBSETS = "abacbbac"  # of the samples; the last has no image
SOURCE, TARGET, NEITHER = [0, 2, 6], [1, 4, 5], [3, 7]


def config_with(**settings: Any) -> RunConfig:
    adaptation = {"of": "image", "field": "subset", "source": ["a"], "target": ["b"], **settings}
    return tiny_config(Path("unused"), objectives={**objectives(), "adaptation": adaptation})


def batch_of(config: RunConfig, subsets: str = SUBSETS) -> Batch:
    samples = [random_sample(i, "t" if i == 7 else "it", config) for i in range(len(subsets))]
    named = zip(samples, subsets, strict=True)
    samples = [dataclasses.replace(each, meta=dataclasses.replace(each.meta, subset=its)) for each, its in named]
    return pack(samples, pack_settings(config))


def test_the_distance_of_moments_against_numpy() -> None:
    config = config_with(kind="moment_alignment")
    batch, model = batch_of(config), PretrainingModel(config)
    outputs, _ = model.mmmoe(batch)
    x = outputs.features["image"].detach().double().numpy() * math.sqrt(config.model.embedding_size)
    source, target = x[SOURCE], x[TARGET]
    covariances = np.cov(source.T) - np.cov(target.T)
    expected = ((source.mean(0) - target.mean(0)) ** 2).mean() + (covariances**2).sum() / (4 * x.shape[1] ** 2)
    losses = model(batch)[1].losses
    assert float(losses["adaptation"]) == pytest.approx(expected, rel=1e-5)  # fp32
    assert model.objectives["adaptation"].counts(batch) == {"adaptation": 6}


def test_domains_that_are_alike_have_no_distance_and_one_of_a_single_sample_no_loss() -> None:
    rows = torch.nn.functional.normalize(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    first = torch.tensor([True] * 3 + [False] * 3)
    assert float(distance_of_moments(torch.cat([rows, rows]), first, ~first)) == pytest.approx(0.0, abs=1e-6)
    config = config_with(kind="moment_alignment")
    model = PretrainingModel(config)
    loss, report = model(batch_of(config, "abaaaaaa"))
    loss.backward()
    assert float(report.losses["adaptation"]) == 0.0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_classifier_against_numpy_and_its_gradient_reversed() -> None:
    """Half of the reversed gradient reaches the features, and the whole plain one the classifier."""
    config = config_with(kind="domain_adversarial", reversal=[[0, 0.0], [10, 1.0]], classifier_size=6)
    batch, model = batch_of(config), PretrainingModel(config)
    module, size = model.tasks["adaptation"], config.model.embedding_size
    module.begin_step(5)
    outputs, _ = model.mmmoe(batch)
    leaf = outputs.features["image"].detach().requires_grad_()
    found = module(dataclasses.replace(outputs, features={**outputs.features, "image": leaf}), batch, model.groups)
    hidden, out = module.hidden, module.out
    plain = outputs.features["image"].detach().requires_grad_()
    logits = out(torch.relu(hidden(plain * math.sqrt(size)))).squeeze(1)
    is_target = torch.sigmoid(logits)
    expected = {
        "adaptation/source": -(1 - is_target[SOURCE]).log().sum(),
        "adaptation/target": -is_target[TARGET].log().sum(),
    }
    torch.testing.assert_close(found, expected)
    assert model.objectives["adaptation"].counts(batch) == {"adaptation/source": 3, "adaptation/target": 3}
    parameters = [hidden.weight, out.bias]
    of_leaf, *own = torch.autograd.grad(sum(found.values()), [leaf, *parameters])
    of_plain, *others = torch.autograd.grad(sum(expected.values()), [plain, *parameters])
    torch.testing.assert_close(of_leaf, -0.5 * of_plain)
    torch.testing.assert_close(own, others)
    assert not of_leaf[NEITHER].any() and of_leaf[SOURCE].any()


def test_without_a_source_all_others_are_of_it() -> None:
    config = config_with(kind="domain_adversarial", source=[])
    counts = PretrainingModel(config).objectives["adaptation"].counts(batch_of(config))
    assert counts == {"adaptation/source": 4, "adaptation/target": 3}


@pytest.mark.parametrize("kind", ["moment_alignment", "domain_adversarial"])
def test_without_samples_every_parameter_has_a_gradient_of_zeros(kind: str) -> None:
    config = config_with(kind=kind)
    model = PretrainingModel(config)
    loss, _ = model(pack([random_sample(0, "", config)], pack_settings(config)))
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"of": "imge"}, "objectives.adaptation.of imge: there is no such representation; did you mean image"),
        ({"source": ["a", "b"]}, "b is of the source and of the target; name it in one of them"),
        ({"target": []}, "at least 1 item"),
        ({"kind": "domain_adversarial", "reversal": -1.0}, r"reversal -1\.0 must be a number from 0 on"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        config_with(**{"kind": "moment_alignment", **settings})
