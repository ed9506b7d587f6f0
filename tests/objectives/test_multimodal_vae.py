"""The multimodal autoencoder: its losses against plain loops over samples and subsets in float64, what has a
gradient, any subset of modalities, and what is refused."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal
from torch.distributions.kl import kl_divergence
from torch.utils.flop_counter import FlopCounterMode

from mmmoe_pretrain.batch import Batch, Item, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.modalities import Modality, build_modalities
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.objectives.multimodal_vae import LatentModule
from mmmoe_pretrain.plan.workload import full_batch
from tests.support import BEGIN, END, pack_settings, random_batch, random_sample, tiny_config

PARTS = ("image", "audio", "text")
SAMPLES = ["iat", "it", "a", "", "iat", "ia"]
SIZE = 3  # shared latent numbers
VAE = {"kind": "multimodal_vae", "modalities": PARTS, "latent_size": SIZE, "hidden_size": 8, "decoder_layers": 1}
PRODUCT = {"joint": "product", "subsets": 2, "beta": 2.0}
MIXTURE = {"joint": "mixture", "private": {"image": 2, "text": 1}, "deviations": {"audio": 0.5}}
PRODUCTS = {"joint": "mixture_of_products", "total_correlation": 0.5, "weights": {"image": 0.1}}
BY_FIELD = {"joint": "product", "condition": {"subset": ["a"]}, "total_correlation": 1.0}
BY_TEXT = {"joint": "mixture", "modalities": ["image", "audio"], "condition": "text"}
CASES = {"product": PRODUCT, "mixture": MIXTURE, "products": PRODUCTS, "a field": BY_FIELD, "a text": BY_TEXT}


def config_with(**settings: Any) -> RunConfig:
    return tiny_config(Path("unused"), objectives={"vae": {**VAE, **settings}}, moe={"losses": {}})


def begun(model: PretrainingModel, batch: Batch) -> PretrainingModel:
    model.begin_step(0, step_counts([batch], model.objectives, None, torch.device("cpu")))
    return model


def module_of(model: PretrainingModel) -> LatentModule:
    found = model.tasks["vae"]
    assert isinstance(found, LatentModule)
    return found


class ByHand:
    """The losses of a batch, as sums over its samples, by loops in float64."""

    def __init__(self, model: PretrainingModel, batch: Batch) -> None:
        self.module, self.batch = module_of(model).double(), batch
        self.settings = self.module.settings
        self.parts = tuple(self.settings.modalities)
        with torch.no_grad():
            features = model.mmmoe(batch)[0].features
        self.inputs = {name: math.sqrt(rows.shape[1]) * rows.double() for name, rows in features.items()}
        sizes = [self.module.objective.passes * SIZE, *self.settings.private.values()]
        noise = batch.noise["vae"].double()
        self.shared = noise[:, : sizes[0]].unflatten(1, (-1, SIZE))
        own = noise[:, sizes[0] : sum(sizes)].split(sizes[1:], dim=1)
        self.own = dict(zip(self.settings.private, own, strict=True))
        self.coins = noise[:, sum(sizes) :].unflatten(1, (-1, len(self.parts))) > 0

    def present(self, b: int) -> tuple[str, ...]:
        found = tuple(name for name in self.parts if self.batch.pooled[name][b] >= 0)
        if self.settings.field:
            return found if self.batch.metas[b].subset in self.settings.field[1] else ()
        if self.settings.representation:
            return found if self.batch.pooled["text"][b] >= 0 else ()
        return found

    def condition(self, b: int) -> Tensor:
        if self.settings.field:
            return torch.ones(1).double()
        return self.inputs["text"][b] if self.settings.representation else torch.zeros(0).double()

    def of_head(self, prefix: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale."""
        weights = {name.removeprefix(prefix): p for name, p in self.module.named_parameters()}
        if "hidden.weight" in weights:
            x = torch.nn.functional.gelu(weights["hidden.weight"] @ x + weights["hidden.bias"])
        mean, free = (weights["out.weight"] @ x + weights["out.bias"]).chunk(2)
        return mean, 0.01 + torch.log1p(free.exp())

    def expert(self, name: str, b: int) -> tuple[Tensor, Tensor]:
        return self.of_head(f"parts.{name}.encoder.", torch.cat([self.inputs[name][b], self.condition(b)]))

    def prior(self, b: int) -> Normal:
        if self.settings.condition is None:
            return Normal(torch.zeros(SIZE).double(), torch.ones(SIZE).double())
        return Normal(*self.of_head("prior.", self.condition(b)))

    def posterior(self, subset: Sequence[str], b: int) -> Normal:
        """Of the canonical form of each Gaussian: precisions, and precisions times means, add up."""
        pairs = [tuple(tensor[:SIZE] for tensor in self.expert(name, b)) for name in subset]
        if self.settings.joint == "product":
            pairs.append((self.prior(b).mean, self.prior(b).stddev))
        precision = sum((scale**-2 for _, scale in pairs), torch.zeros(SIZE).double())
        return Normal(sum((mean / scale**2 for mean, scale in pairs), torch.zeros(SIZE).double()) / precision,
                      precision**-0.5)  # fmt: skip

    def private(self, name: str, b: int) -> Normal:
        return Normal(*(tensor[SIZE:] for tensor in self.expert(name, b)))

    def log_likelihood(self, name: str, z: Tensor, b: int) -> Tensor:
        truth = self.batch.originals[name]
        chosen = truth.samples == b
        latent = [z]
        if name in self.own:
            q = self.private(name, b)
            latent.append(q.mean + q.stddev * self.own[name][b])
        decoder = self.module.decoder(name)
        found = decoder(torch.cat([*latent, self.condition(b)])[None, None], truth.samples[chosen] * 0,
                        truth.places[chosen])[0]  # fmt: skip
        if name == "text":
            return Categorical(logits=found).log_prob(truth.content[chosen]).sum()
        deviation = 0.5 if name in self.settings.deviations else 1.0  # a learned one begins at 1
        return Normal(found, deviation).log_prob(truth.content[chosen].double()).sum()

    def subsets(self, b: int) -> list[tuple[int, tuple[str, ...]]]:
        """The passes of a sample by number, each with its modalities."""
        has, parts = self.present(b), self.parts
        single = [(name,) for name in parts]
        if self.settings.joint == "product":
            drawn = [tuple(itertools.compress(parts, row)) for row in self.coins[b].tolist()]
            every = [tuple(n for n in subset if n in has) for subset in (parts, *single, *drawn)]
            return [(q, subset) for q, subset in enumerate(every) if subset]
        if self.settings.joint == "mixture":
            every = list(single)
        else:
            masks = itertools.product((True, False), repeat=len(parts))
            every = [tuple(itertools.compress(parts, mask)) for mask in masks if any(mask)]
        return [(q, subset) for q, subset in enumerate(every) if set(subset) <= set(has)]

    def losses(self) -> Mapping[str, float]:
        sums: dict[str, Tensor] = dict.fromkeys([*self.parts, "kl", "kl_private"], torch.zeros(()).double())
        for b in range(len(self.batch.metas)):
            passes = self.subsets(b)
            posteriors = {q: self.posterior(subset, b) for q, subset in passes}
            for q, subset in passes:
                mine, share = posteriors[q], 1 / len(passes)
                z = mine.mean + mine.stddev * self.shared[b, q]
                if self.settings.joint == "product":
                    kl = kl_divergence(mine, self.prior(b)).sum()
                else:
                    means, scales = (torch.stack([getattr(p, key) for p in posteriors.values()])
                                     for key in ("mean", "stddev"))  # fmt: skip
                    equal = Categorical(torch.ones(len(passes)).double())
                    mixture = MixtureSameFamily(equal, Independent(Normal(means, scales), 1))
                    kl = mixture.log_prob(z) - self.prior(b).log_prob(z).sum()
                sums["kl"] = sums["kl"] + share * float(self.settings.beta) * kl
                for name in subset if self.settings.joint == "product" else self.present(b):
                    weight = share * self.settings.weights.get(name, 1.0)
                    sums[name] = sums[name] - weight * self.log_likelihood(name, z, b)
                    if name in self.own:
                        kl = kl_divergence(self.private(name, b), Normal(0.0, 1.0)).sum()
                        sums["kl_private"] = sums["kl_private"] + share * kl
        return {f"vae/{name}": value.item() for name, value in sums.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_the_bound_of_each_sample(case: str) -> None:
    config = config_with(**CASES[case])
    model, batch = PretrainingModel(config), random_batch(config, SAMPLES)
    for name, parameter in module_of(model).named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    _, report = begun(model, batch)(batch)
    by_hand = ByHand(model, batch)
    count = sum(bool(by_hand.present(b)) for b in range(len(SAMPLES)))
    assert set(model.objectives["vae"].counts(batch).values()) == {count}
    found = {name: float(value) for name, value in report.losses.items()}
    expected = {name: value / count for name, value in by_hand.losses().items() if name in found}
    assert {name for name in found if "total_correlation" not in name} == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name  # fp32, sums of thousands


def test_the_total_correlation_is_of_the_posteriors_of_the_batch() -> None:
    """Against densities of torch, of the posteriors of all modalities of each sample that takes part."""
    config = config_with(**BY_FIELD)
    model, batch = PretrainingModel(config), random_batch(config, SAMPLES)
    _, report = begun(model, batch)(batch)
    by_hand = ByHand(model, batch)
    taking_part = [b for b in range(len(SAMPLES)) if by_hand.present(b)]
    posteriors = [by_hand.posterior(by_hand.present(b), b) for b in taking_part]
    found = []
    for b, q in zip(taking_part, posteriors, strict=True):
        z = q.mean + q.stddev * by_hand.shared[b, 0]
        each = torch.stack([other.log_prob(z).exp() for other in posteriors])
        found.append(each.prod(dim=1).mean().log() - each.mean(dim=0).log().sum())
    expected = float(torch.stack(found).mean().detach())
    assert float(report.losses["vae/total_correlation"]) == pytest.approx(expected, abs=1e-4)


def test_numbers_that_were_not_measured_have_no_likelihood() -> None:
    config = config_with(**PRODUCT)
    model, batch = PretrainingModel(config), random_batch(config, ["i"])
    decoder, truth = module_of(model).decoder("image"), batch.originals["image"]
    z, measured = torch.randn(1, 1, SIZE), torch.rand(truth.content.shape) < 0.5
    mean = decoder(z, truth.samples, truth.places)[0].detach()
    expected = Normal(mean, 1.0).log_prob(truth.content)[measured].sum()
    truth.content[~measured] = math.nan
    found = decoder.log_likelihood(z, truth)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("samples", [["", ""], []], ids=["no modality", "no sample"])
def test_without_a_sample_the_loss_and_every_gradient_are_zero(case: str, samples: list[str]) -> None:
    config = config_with(**CASES[case])
    model, batch = PretrainingModel(config), random_batch(config, samples)
    loss, _ = begun(model, batch)(batch)
    loss.backward()
    assert not loss
    assert all(p.grad is not None and not p.grad.any() for p in model.tasks.parameters())


def reached(model: PretrainingModel, name: str) -> bool:
    """Whether the embedder of a modality has a gradient."""
    every = model.mmmoe.named_parameters()
    return any(bool(p.grad.any()) for key, p in every if key.startswith(f"embedders.{name}.") and p.grad is not None)


@pytest.mark.parametrize("joint", ["product", "mixture", "mixture_of_products"])
def test_every_modality_learns_from_what_is_generated(joint: str) -> None:
    """Of a mixture the text gives an image, too; alone, a text of a product gives itself."""
    config = config_with(joint=joint)
    model, batch = PretrainingModel(config), random_batch(config, ["iat", "it"])
    module, outputs = module_of(model), model.mmmoe(batch)[0]
    module(outputs, batch, model.groups)["vae/image"].backward()
    assert reached(model, "image") and reached(model, "audio") and reached(model, "text")
    parts = {key.split(".")[1] for key, p in module.named_parameters() if "decoder" in key and p.grad is not None
             and p.grad.any()}  # fmt: skip
    assert parts == {"image"}


def test_draws_are_of_a_sample_and_not_of_its_batch() -> None:
    config = config_with(**PRODUCT)
    samples, settings = [random_sample(i, "iat", config) for i in range(4)], pack_settings(config)
    whole, part = pack(samples, settings, range(7, 11)), pack(samples[2:], settings, [9, 10])
    assert torch.equal(whole.noise["vae"][2:], part.noise["vae"])
    assert not torch.equal(whole.noise["vae"][0], whole.noise["vae"][1])
    other = pack_settings(config.model_copy(update={"seed": config.seed + 1}))
    assert not torch.equal(pack(samples, other, range(7, 11)).noise["vae"], whole.noise["vae"])


@pytest.mark.parametrize("case", CASES)
def test_the_flops_of_an_estimate_are_counted(case: str) -> None:
    """Of samples at full length; a text has one place less than tokens. The total correlation is elementwise, which
    a counter of products of matrices does not see."""
    config = config_with(**{**CASES[case], "total_correlation": 0.0})
    model, batch = PretrainingModel(config), full_batch(config, 4)
    with torch.no_grad():
        outputs = model.mmmoe(batch)[0]
        with FlopCounterMode(display=False) as counter:
            module_of(model)(outputs, batch, model.groups)
    taking_part = int(model.objectives["vae"].taking_part(batch).sum())
    found = model.objectives["vae"].flops(config.model.embedding_size, 4) * 4
    assert taking_part in (0, 4) and found == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_a_schedule_of_beta() -> None:
    config = config_with(joint="product", beta=[[0, 0.0], [10, 1.0]])
    model, batch = PretrainingModel(config), random_batch(config, SAMPLES)
    found = []
    for step in (0, 5, 10):
        model.begin_step(step, step_counts([batch], model.objectives, None, torch.device("cpu")))
        found.append(float(model(batch)[1].losses["vae/kl"]))
    assert found[0] == 0 and found[1] == pytest.approx(found[2] / 2) and found[2] > 0


COLOURS = np.array([[220, 30, 30], [30, 200, 40], [40, 60, 220], [230, 220, 40]], dtype=np.uint8)


def plain_colours(config: RunConfig, positions: range, has: str = "it") -> Batch:
    """Images of one colour, each with the piece that names it: number 10 and following of the vocabulary."""
    samples = []
    for position in positions:
        colour = position % len(COLOURS)
        image = np.broadcast_to(COLOURS[colour][:, None, None], (3, 16, 16)).copy()
        items = (Item("image", image), Item("text", np.array([BEGIN, 10 + colour, END])))
        samples.append(Sample(SampleMeta(f"{position}"), tuple(item for item in items if item.modality[0] in has)))
    return pack(samples, pack_settings(config), positions)


def test_a_colour_is_generated_from_its_name_and_named() -> None:
    """The right answer is known: of four colours, each with its name, both ways, after 120 steps."""
    vae = {**VAE, "modalities": ["image", "text"], "joint": "mixture", "hidden_size": 32, "weight": 0.01,
           "weights": {"text": 20.0}}  # fmt: skip
    config = tiny_config(
        Path("unused"),
        modalities={"image": {"kind": "image", "size": 16, "stem": "linear"}, "text": {"kind": "text"}},
        objectives={"vae": vae},
        moe={"num_experts": 2, "expert_hidden_size": 8},
    )
    model, settings = PretrainingModel(config), {"lr": 1e-2, "betas": (0.9, 0.95)}
    optimizer = torch.optim.Adam(model.parameters(), **settings)
    for step in range(120):
        batch = plain_colours(config, range(8 * step, 8 * (step + 1)))
        optimizer.zero_grad()
        begun(model, batch)(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    module = module_of(model)
    for seen, target in (("text", "image"), ("image", "text")):
        batch = plain_colours(config, range(len(COLOURS)), has=seen[0])  # the other is not there
        with torch.no_grad():
            features = model.mmmoe(batch)[0].features
            length = 4 if target == "image" else 2
            made = module.generate(target, module.latent([seen], features, batch), features, batch, [length] * 4)
        if target == "text":
            assert [content.tolist() for content in made] == [[10 + colour, END] for colour in range(4)]
            continue
        values = np.stack([model_image(config).rebuilt(content.numpy()) for content in made])
        apart = np.abs(values.mean(axis=(2, 3))[:, None] - COLOURS[None]).mean(axis=-1)
        assert apart.argmin(axis=1).tolist() == [0, 1, 2, 3]
        assert apart.min(axis=1).max() < 40  # of 255


def model_image(config: RunConfig) -> Modality:
    return build_modalities(config.modalities, decoding=False)["image"]


class _Affine(torch.nn.Module):
    """In place of a decoder: the mean of each number is a linear map of z."""

    def __init__(self, weight: Tensor, like: Any) -> None:
        super().__init__()
        self.weight, self.like = torch.nn.Parameter(weight), like

    def log_likelihood(self, z_QBZ: Tensor, truth: Any) -> Tensor:
        mean = (z_QBZ @ self.weight.T)[:, truth.samples]
        each = Normal(mean, 1.0).log_prob(truth.content).sum(dim=-1)
        return each.new_zeros(z_QBZ.shape[:2]).index_add(1, truth.samples, each)


def test_the_importance_bound_of_the_module_nears_the_likelihood_of_a_linear_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decoders are linear, so log p of a sample is that of one Gaussian; the encoder's posterior is not the true one,
    but wider. 300 draws leave an error of about 0.05."""
    config = config_with(joint="product", modalities=["image", "audio"])
    model, batch = PretrainingModel(config), random_batch(config, ["ia", "i", "a"])
    module = module_of(model)
    sizes = {name: batch.originals[name].content.shape[1] for name in ("image", "audio")}
    generator = torch.Generator().manual_seed(0)
    maps = {name: 0.02 * torch.randn(size, SIZE, generator=generator) for name, size in sizes.items()}
    for name, parameter in module.named_parameters():
        if name.endswith("encoder.out.bias"):
            torch.nn.init.constant_(parameter[SIZE:], 2.0)  # of scales
    monkeypatch.setattr(module, "decoder", lambda name: _Affine(maps[name], None))
    with torch.no_grad():
        features = model.mmmoe(batch)[0].features
        elbo, importance, taking_part = module.bounds(features, batch, 300, generator)
    assert taking_part.tolist() == [True] * 3
    for b in range(3):
        rows = [
            (maps[name], its.content[its.samples == b])
            for name, its in ((name, batch.originals[name]) for name in maps)
        ]
        w = torch.cat([m for m, content in rows for _ in content]).double()
        x = torch.cat([content.flatten() for _, content in rows]).double()
        density = MultivariateNormal(torch.zeros(SIZE).double(), torch.eye(SIZE).double())
        # log p(x) = log N(x; 0, W W' + 1), by the posterior: log p(x|z) + log p(z) - log p(z|x) at any z
        precision = w.T @ w + torch.eye(SIZE).double()
        mean = torch.linalg.solve(precision, w.T @ x)
        posterior = MultivariateNormal(mean, precision_matrix=precision)
        exact = Normal(w @ mean, 1.0).log_prob(x).sum() + density.log_prob(mean) - posterior.log_prob(mean)
        assert importance[b].item() == pytest.approx(exact.item(), abs=0.15)
        assert elbo[b] < importance[b]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modalities": ["image", "sound"]}, r"vae.modalities sound: there is no such modality; "),
        ({"modalities": ["image", "image"]}, r"names one twice; name each once"),
        ({"latent_size": 0}, r"latent_size: .* greater than or equal to 1"),
        ({"private": {"speech": 2}}, r"vae.private names speech, which is not generated; its modalities are image,"),
        ({"deviations": {"text": 1.0}}, r"vae.deviations text: its tokens are discrete"),
        ({"condition": "image"}, r"vae.condition image holds image, which is generated .* out of one of them"),
        ({"condition": "title"}, r"vae.condition title: there is no such representation"),
        ({"condition": {"subset": ["a", "a"]}}, r"vae.condition subset names a value twice"),
        ({"joint": "mixture", "subsets": 2}, r"subsets 2 with joint mixture: .* leave subsets out"),
        ({"beta": -1.0}, r"beta -1.0 must be a number from 0 on"),
        ({"joint": "sum"}, r"joint: .* 'product', 'mixture' or 'mixture_of_products'"),
    ],
)  # fmt: skip
def test_what_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_with(**settings)


def test_images_at_their_own_aspect_are_refused() -> None:
    image = {"kind": "image", "aspect": "native", "stem": "linear", "max_tokens": 4}
    config = tiny_config(Path("unused"), modalities={"image": image, "text": {"kind": "text"}},
                         objectives={"vae": {**VAE, "modalities": ["image", "text"]}})  # fmt: skip
    with pytest.raises(ValueError, match=r"places of their own; set modalities\.image\.aspect: square"):
        PretrainingModel(config)
