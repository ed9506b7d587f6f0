"""Completion: the losses of both heads against plain float64, the density against torch.distributions, and what has
a gradient."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.objectives.completion import Mixture
from tests.support import objectives, random_batch, tiny_config

COMPLETE = {"kind": "completion", "source": ["image", "audio"], "target": "text", "hidden_size": 12}
SAMPLES = ["iat", "it", "iat", "ia", "t", "", "iat"]  # of which the first, third and last take part
TAKING_PART = [0, 2, 6]
MIXTURE = {"head": "mixture", "components": 3, "min_scale": 0.2}
SIZE = 8  # of the joint space


def config_with(**settings: Any) -> RunConfig:
    return tiny_config(Path("unused"), objectives={"complete": {**COMPLETE, **settings}},
                       optimizer={"average": 0.9}, moe={"losses": {}})  # fmt: skip


def begun(model: PretrainingModel, batch: Batch) -> PretrainingModel:
    model.begin_step(0, step_counts([batch], model.objectives, None, torch.device("cpu")))
    return model


def output(model: PretrainingModel, source: list[Tensor]) -> Tensor:
    """What the head says of one sample, in float64."""
    up, up_bias, down, down_bias = (
        model.tasks["complete"].get_parameter(name).detach().double()
        for name in ("up", "up_bias", "down", "down_bias")
    )
    x = math.sqrt(SIZE) * torch.cat(source)
    before = up @ x + up_bias
    return down @ (before * 0.5 * (1 + torch.erf(before / math.sqrt(2)))) + down_bias


def by_hand(model: PretrainingModel, batch: Batch) -> list[Tensor]:
    """The loss of each sample that takes part."""
    with torch.no_grad():
        features = {name: rows.double() for name, rows in model.mmmoe(batch)[0].features.items()}
    settings, found = model.config.objectives["complete"], []
    for i in TAKING_PART:
        target, said = features["text"][i], output(model, [features["image"][i], features["audio"][i]])
        if settings.head == "regression":
            found.append(1 - said @ target / (said.norm() * target.norm()))
            continue
        logits, rest = said[:3], said[3:].view(3, 2, SIZE)
        means = rest[:, 0] / math.sqrt(SIZE)
        scales = (0.2 + torch.log1p(rest[:, 1].exp())) / math.sqrt(SIZE)
        density = MixtureSameFamily(Categorical(logits=logits), Independent(Normal(means, scales), 1))
        found.append(-density.log_prob(target))
    return found


@pytest.mark.parametrize("head", [{}, MIXTURE], ids=["regression", "mixture"])
def test_the_loss_is_that_of_samples_with_source_and_target(head: dict[str, Any]) -> None:
    config = config_with(**head)
    model, batch = PretrainingModel(config), random_batch(config, SAMPLES)
    torch.nn.init.normal_(model.tasks["complete"].get_parameter("down_bias"), std=0.5)
    _, report = begun(model, batch)(batch)
    assert model.objectives["complete"].counts(batch) == {"complete/text": 3}
    expected = float(torch.stack(by_hand(model, batch)).mean())
    assert float(report.losses["complete/text"]) == pytest.approx(expected, rel=1e-5)  # fp32


@pytest.mark.parametrize("head", [{}, MIXTURE], ids=["regression", "mixture"])
def test_the_gradient_reaches_the_source_and_the_head_and_not_the_target(head: dict[str, Any]) -> None:
    config = config_with(**head)
    model, batch = PretrainingModel(config), random_batch(config, SAMPLES)
    loss, _ = begun(model, batch)(batch)
    loss.backward()
    for part in ("joint_heads.{}.", "embedders.{}."):
        reached = {
            name: any(p.grad.any() for key, p in model.mmmoe.named_parameters() if key.startswith(part.format(name)))
            for name in ("image", "audio", "text")
        }
        assert reached == {"image": True, "audio": True, "text": False}, part
    assert all(p.grad is not None for p in model.parameters())  # engines wait for each
    assert all(p.grad.any() for p in model.tasks["complete"].parameters())


def test_a_teacher_gives_the_target() -> None:
    config = config_with(from_average=True)
    batch = random_batch(config, SAMPLES)
    model = begun(PretrainingModel(config), batch)
    (weight,) = model.mmmoe.joint_heads["text"].parameters()
    average, own = torch.flip(weight.detach(), dims=[0]), weight.detach().clone()
    model.begin_look("teaching")
    with torch.no_grad():
        weight.copy_(average)
        model(batch)
        taught = by_hand(model, batch)  # the source has the same vectors
        weight.copy_(own)
    model.end_look()
    _, report = begun(model, batch)(batch)
    expected, without = float(torch.stack(taught).mean()), float(torch.stack(by_hand(model, batch)).mean())
    assert float(report.losses["complete/text"]) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(without, rel=1e-2)


@pytest.mark.parametrize("kind", ["early", "late"])
def test_a_fused_target_is_of_samples_with_all_of_its_parts(kind: str) -> None:
    """Else the vector that it makes of the source alone would be learned, too."""
    scene = {"scene": {"kind": kind, "parts": ["audio", "text"], "missing": "allow"}}
    complete = {**COMPLETE, "source": "image", "target": "scene"}
    config = tiny_config(Path("unused"), representations=scene, objectives={"complete": complete})
    model, batch = PretrainingModel(config), random_batch(config, ["it", "iat", "ia", "at", "", "t", "iat"])
    objective = model.objectives["complete"]
    assert (batch.pooled["scene"] >= 0).tolist() == [True, True, True, True, False, True, True]
    assert objective.taking_part(batch).tolist() == [False, True, False, False, False, False, True]
    assert objective.counts(batch) == {"complete/scene": 2}
    assert objective.needs() == {"complete of scene by image": {"image", "audio", "text"}}


@pytest.mark.parametrize("head", [{}, MIXTURE], ids=["regression", "mixture"])
@pytest.mark.parametrize("samples", [["it", "a"], []], ids=["no complete sample", "no sample"])
def test_without_a_complete_sample_the_loss_and_every_gradient_are_zero(
    head: dict[str, Any], samples: list[str]
) -> None:
    config = config_with(**head)
    model, batch = PretrainingModel(config), random_batch(config, samples)
    loss, _ = begun(model, batch)(batch)
    loss.backward()
    assert not loss
    assert all(p.grad is not None and not p.grad.any() for p in model.tasks["complete"].parameters())


def mixture(size: int) -> Mixture:
    """Of 3 Gaussians for each of 4 rows, float64."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3, size)
    logits, means, free = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, 3), shape, shape))
    return Mixture(logits, means, 0.1 + free.exp())


def test_the_density_integrates_to_one() -> None:
    places = torch.linspace(-60, 60, 24_001, dtype=torch.float64)  # 1/200 apart; the least scale is above 0.1
    one = mixture(1)
    for row in range(4):
        of_row = (tensor[[row]] for tensor in (one.logit_BK, one.mean_BKP, one.scale_BKP))
        everywhere = Mixture(*(tensor.expand(len(places), *tensor.shape[1:]) for tensor in of_row))
        density = everywhere.log_prob(places[:, None]).exp()
        assert float(torch.trapezoid(density, places)) == pytest.approx(1.0, abs=1e-8)


def test_draws_have_the_moments_of_the_density() -> None:
    found, number = mixture(5), 20_000
    other = MixtureSameFamily(
        Categorical(logits=found.logit_BK), Independent(Normal(found.mean_BKP, found.scale_BKP), 1)
    )
    assert torch.allclose(found.mean(), other.mean, rtol=1e-12)
    drawn = found.sample(number, torch.Generator().manual_seed(1))
    assert drawn.shape == (number, 4, 5)
    error = other.variance.sqrt() / math.sqrt(number)
    assert ((drawn.mean(dim=0) - other.mean).abs() < 5 * error).all()
    assert torch.allclose(drawn.var(dim=0), other.variance, rtol=0.1, atol=0)  # 5 of its errors


REPRESENTATIONS = {"scene": {"kind": "late", "parts": ["image", "audio"], "missing": "allow"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target": "tex"},
            r"objectives\.complete\.target tex: there is no such representation; did you mean text\?",
        ),
        ({"source": ["imag"]}, r"objectives\.complete\.source imag: there is no such .*; did you mean image\?"),
        ({"source": ["image", "image"]}, r"objectives\.complete\.source .* names a representation twice"),
        (
            {"source": "text"},
            r"\.target text has no modality beside those of text \(objectives.complete.source\).*never missing",
        ),
        ({"source": "scene", "target": "audio"}, r"target audio has no modality beside those of scene"),
        ({"source": []}, r"objectives\.complete\.source"),
        ({"min_scale": 0}, r"objectives\.complete\.min_scale: .* greater than 0"),
        ({"from_average": True}, r"objectives\.complete learns from the model with the average of its weights"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    complete = {**objectives(), "complete": {**COMPLETE, **settings}}
    with pytest.raises(ValueError, match=message):
        tiny_config(Path("unused"), objectives=complete, representations=REPRESENTATIONS)


def test_a_loss_that_can_be_negative_has_no_learned_weight() -> None:
    train = {"steps": 20, "global_batch_size": 16, "loss_weighting": "uncertainty"}
    for head, refused in ((MIXTURE, True), ({}, False)):
        complete = {**objectives(), "complete": {**COMPLETE, **head}}
        if not refused:
            tiny_config(Path("unused"), objectives=complete, train=train)
            continue
        with pytest.raises(ValueError, match=r"objectives\.complete is of a density and can be negative"):
            tiny_config(Path("unused"), objectives=complete, train=train)
