"""OGM-GE: the coefficients of the paper's formula by hand, the scores of the parts in numpy, and the gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.base import representation_settings
from mmmoe_pretrain.models.fusion.late import Late
from mmmoe_pretrain.models.fusion.modulation import Modulation, normal
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from tests.support import objectives, random_batch, tiny_config

SAMPLES = ["iat", "iat", "it", "iat", "at"]  # the third lacks audio, the last images


def config_of(more: dict[str, Any] | None, fusion: str = "late", objective: str = "contrastive") -> RunConfig:
    scene = {"kind": fusion, "parts": ["image", "audio"], "missing": "allow", "modulation": more}
    tasks = objectives({"pairs": {"scene-text": 1.0}, "kind": objective}, None)
    return tiny_config(Path("unused"), representations={"scene": scene}, objectives=tasks)


def made(config: RunConfig, scores: tuple[float, float] | None = None) -> PretrainingModel:
    model = PretrainingModel(config)
    if scores:
        for part, score in zip(("image", "audio"), scores, strict=True):
            modulation_of(model).get_buffer(f"score_{part}").fill_(score)
    return model


def modulation_of(model: PretrainingModel) -> Modulation:
    module = model.modulations["scene"]
    assert isinstance(module, Modulation)
    return module


def gradients(model: PretrainingModel, batch: Batch) -> tuple[float, dict[str, Tensor]]:
    loss, _ = model(batch)
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("scores", "ratios", "coefficients"),
    [
        ((0.0, 0.0), (1.0, 1.0), (1.0, 1.0)),  # before the first step
        ((0.3, 0.3), (1.0, 1.0), (1.0, 1.0)),
        ((0.6, 0.3), (2.0, 0.5), (1 - math.tanh(0.4 * 2), 1.0)),
        ((0.1, 0.4), (0.25, 4.0), (1.0, 1 - math.tanh(0.4 * 4))),
        ((0.6, 0.3, 0.3), (2.0, 0.3 / 0.45, 0.3 / 0.45), (1 - math.tanh(0.8), 1.0, 1.0)),
    ],
)
def test_coefficients_are_those_of_the_paper(scores: tuple, ratios: tuple, coefficients: tuple) -> None:
    parts = ["image", "audio", "text"][: len(scores)]
    settings = representation_settings({"kind": "late", "parts": parts, "modulation": {"alpha": 0.4}})
    modulation = Modulation("scene", settings)
    modulation.add(torch.tensor([*(5 * score for score in scores), 5.0], dtype=torch.float64))
    modulation.after_step(committed=True)
    assert modulation.ratios.tolist() == pytest.approx(ratios)
    assert modulation.coefficients.tolist() == pytest.approx(coefficients)
    names = [f"{what}/scene/{part}" for what in ("score", "ratio", "coefficient") for part in parts]
    expected = dict(zip(names, (*scores, *ratios, *coefficients), strict=True))
    assert {name: float(value) for name, value in modulation.figures().items()} == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["contrastive", "sigmoid_contrastive"])
def test_scores_are_the_probabilities_that_the_parts_give_to_the_true_side(kind: str) -> None:
    """softmax over the texts of a part's share of the scores, sample by sample, of samples with both parts."""
    config = config_of({}, objective=kind)
    model = made(config)
    batches = [random_batch(config, SAMPLES, seed) for seed in (1, 2)]
    model.begin_step(0, step_counts(batches, model.objectives, None, torch.device("cpu")))
    found: dict[str, list[float]] = {"image": [], "audio": []}
    routing = []
    for batch in batches:
        routing.append(model(batch)[1].routing)
        with torch.no_grad():
            x_nD, _ = model.mmmoe.run_stage(batch, None)
            text = model.mmmoe.heads(x_nD, batch).features["text"].numpy()
        head = model.mmmoe.joint_heads["scene"].weight.detach().numpy()
        scale = 1 / config.objectives["contrastive"].initial_temperature
        for b, has in enumerate(SAMPLES):
            if "i" not in has or "a" not in has:
                continue
            rows = batch.segment_ids[: x_nD.shape[0]]
            means = {part: x_nD[rows == batch.pooled[part][b]].mean(0).numpy() for part in found}
            halves = {part: head @ mean / 2 for part, mean in means.items()}  # equal weights at the start
            length = np.linalg.norm(sum(halves.values()))
            for part, half in halves.items():
                logits = scale * text @ half / length
                found[part].append(float(np.exp(logits[b]) / np.exp(logits).sum()))
    assert not modulation_of(model).scores.any()
    model.end_step(tuple(a + b for a, b in zip(*routing, strict=True)))
    expected = [float(np.mean(values)) for values in found.values()]
    assert modulation_of(model).scores.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(model.balance()["score/scene/image"]) == pytest.approx(expected[0], rel=1e-5)
    assert len(found["image"]) == 6 and expected[0] != pytest.approx(expected[1], rel=1e-3)


@pytest.mark.parametrize("noise", [False, True])
def test_the_gradient_that_flows_into_a_part_is_scaled(noise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the model without modulation: its gradient less that which flows into a part, found by cutting the part
    off, times what the factor lacks to 1. With noise each sample has its own factor."""
    plain, modulated = config_of(None), config_of({"alpha": 0.4, "noise": noise})
    samples = SAMPLES[1:4]
    batch = random_batch(plain, samples)
    model = made(modulated, (0.6, 0.3))
    model.begin_step(3)
    loss, found = gradients(model, batch)
    factor_PB = modulation_of(model).factors(batch, modulated.seed, 3)
    if noise:
        keys = [sample.identity for sample in batch.metas]
        drawn = [normal(keys, f"{modulated.seed}/3/scene/{part}") for part in ("image", "audio")]
        np.testing.assert_allclose(factor_PB[:, 0], [1 - math.tanh(0.8) + drawn[0][0], 1 + drawn[1][0]], rtol=1e-5)
    else:
        assert factor_PB.tolist() == [[pytest.approx(1 - math.tanh(0.8))] * 3, [1.0] * 3]
    same_loss, whole = gradients(made(plain), batch)
    assert loss == pytest.approx(same_loss)
    expected = {name: grad.clone() for name, grad in whole.items()}
    terms = Late.terms
    at_once = [slice(b, b + 1) for b in range(len(samples))] if noise else [slice(None)]
    for part, some in [(part, some) for part in range(2) for some in at_once]:

        def cut(self: Late, mean_PBD: Tensor, present_PB: Tensor, here: tuple[int, slice] = (part, some)) -> Tensor:
            kept = mean_PBD.clone()
            kept[here] = mean_PBD[here].detach()
            return terms(self, kept, present_PB)

        monkeypatch.setattr(Late, "terms", cut)
        _, without = gradients(made(plain), batch)
        for name in expected:
            expected[name] -= (1 - float(factor_PB[part, some][0])) * (whole[name] - without[name])
    assert found.keys() == whole.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    changed = {name for name, grad in found.items() if not torch.allclose(grad, whole[name], rtol=1e-3, atol=1e-6)}
    assert any(name.startswith("mmmoe.embedders.image") for name in changed)
    assert noise == any(name.startswith("mmmoe.embedders.audio") for name in changed)
    assert not any(".fusions." in name or ".joint_heads." in name or name.startswith("tasks") for name in changed)


def test_held_out_and_skipped_steps_leave_the_scores() -> None:
    model = made(config_of({"noise": True}), (0.6, 0.3))
    batch = random_batch(model.config, SAMPLES)
    scores = modulation_of(model).scores
    model.eval()
    routing = model(batch)[1].routing
    model.end_step(routing)
    model.train()
    model(batch)
    model.end_step(None)
    assert torch.equal(modulation_of(model).scores, scores)
    model(random_batch(model.config, ["it", "at", "t"]))  # no sample has both parts
    model.end_step(routing)
    assert torch.equal(modulation_of(model).scores, scores)
    model(batch)
    model.end_step(routing)
    assert not torch.equal(modulation_of(model).scores, scores)


def test_noise_is_standard_normal_and_a_function_of_the_sample() -> None:
    keys = [f"sample-{i}" for i in range(20_000)]
    drawn = normal(keys, "1/2/scene/image")
    assert abs(drawn.mean()) < 5 / 20_000**0.5 and abs(drawn.std() - 1) < 5 / 40_000**0.5
    assert abs((drawn**3).mean()) < 0.14 and abs((drawn**4).mean() - 3) < 0.35  # five standard errors of each
    with FakeTensorMode():  # as where a plan measures memory
        assert normal(keys[7:9], "1/2/scene/image").tolist() == drawn[7:9].tolist()
    other = normal(keys, "1/2/scene/audio")
    assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.036


def test_what_cannot_be_measured_is_refused() -> None:
    scene = {"kind": "late", "parts": ["image", "audio"], "modulation": {}}
    with pytest.raises(
        ValueError, match=r"no contrastive objective has a pair with scene; add one, e\.g\. scene-text"
    ):
        tiny_config(Path("unused"), representations={"scene": scene})
    pairs = {"kind": "deep_cca", "pairs": {"scene-text": 1.0}}
    with pytest.raises(ValueError, match="no contrastive objective has a pair with scene"):
        tiny_config(Path("unused"), representations={"scene": scene}, objectives={"cca": pairs})
    with pytest.raises(ValueError, match=r"modulation"):
        config_of({}, "early")
    with pytest.raises(ValueError, match=r"alpha"):
        config_of({"alpha": -1})
