"""Learned weights of losses: the total and the gradients of the log variances, by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from tests.support import objectives, random_batch, tiny_config


def test_the_total_and_its_gradient_are_those_of_the_formula() -> None:
    tasks = objectives({"pairs": {"image-text": 1.0, "audio-text": 2.0}}, {"weight": 0.5, "fraction": 1.0})
    train = {"global_batch_size": 8, "num_microbatches": 2}
    fixed = PretrainingModel(tiny_config(Path("unused"), objectives=tasks, train=train))
    learned = PretrainingModel(
        tiny_config(Path("unused"), objectives=tasks, train={**train, "loss_weighting": "uncertainty"})
    )
    variances = {"contrastive-image-text": 0.3, "contrastive-audio-text": -0.2, "captioning": 1.0}
    assert learned.loss_weighting is not None
    assert learned.loss_weighting.log_variance.keys() == variances.keys()
    with torch.no_grad():
        for key, value in variances.items():
            learned.loss_weighting.log_variance[key].fill_(value)
    batches = [random_batch(fixed.config, ["iat"] * 4, seed) for seed in range(2)]
    values: dict[str, float] = {}
    totals = []
    for model in (fixed, learned):
        model.begin_step(0, step_counts(batches, model.objectives, None, torch.device("cpu")))
        reports = []
        for batch in batches:
            total, report = model(batch)
            total.backward()
            reports.append({**report.losses, "all": total.detach()})
        sums = {name: sum(float(its[name]) for its in reports) for name in reports[0]}
        values = values or sums
        totals.append(sums["all"])
    own = {loss: values[loss] for loss in fixed.objectives.losses}
    scaled = {loss: math.exp(-variances[loss.replace("/", "-")]) * value for loss, value in own.items()}
    told = {name: float(value) for name, value in learned.balance().items()}
    weights = {f"weight/{loss}": math.exp(-variances[loss.replace("/", "-")]) for loss in own}
    assert told == pytest.approx(weights) and not fixed.balance()
    added = sum(variances.values()) / 2
    assert totals[1] == pytest.approx(totals[0] - sum(own.values()) + sum(scaled.values()) + added, rel=1e-5)
    for loss, value in scaled.items():
        gradient = learned.loss_weighting.log_variance[loss.replace("/", "-")].grad
        assert gradient is not None and float(gradient) == pytest.approx(0.5 - value, rel=1e-5)


def test_held_out_losses_have_the_weights_of_the_config() -> None:
    config = tiny_config(Path("unused"), train={"loss_weighting": "uncertainty"})
    model = PretrainingModel(config).eval()
    assert model.loss_weighting is not None
    batch = random_batch(config, ["iat", "it"])
    with torch.no_grad():
        before = model(batch)[1].losses
        for value in model.loss_weighting.parameters():
            value.fill_(3.0)
        after = model(batch)[1].losses
    assert before == after and "weighting" not in after


def test_a_loss_without_terms_in_a_step_keeps_its_weight() -> None:
    config = tiny_config(
        Path("unused"), objectives=objectives(captioning=None), train={"loss_weighting": "uncertainty"}
    )
    model = PretrainingModel(config)
    assert model.loss_weighting is not None
    total, report = model(random_batch(config, ["it"] * 4))
    total.backward()
    gradients = {name: float(value.grad) for name, value in model.loss_weighting.log_variance.items()}
    assert gradients["contrastive-audio-text"] == gradients["contrastive-image-audio"] == 0
    loss = float(report.losses["contrastive/image-text"])  # its factor is exp(0)
    assert gradients["contrastive-image-text"] == pytest.approx(0.5 - loss, rel=1e-5)
