"""A multimodal variational autoencoder behind the trunk: latent numbers z from which every modality of a sample can
be generated, and which any subset of its modalities gives a Gaussian posterior of (q, by encoder heads that read the
vector of each modality). What a decoder says of an item, and so the likelihood, is in latent_decoder.py.

The loss is the negative evidence lower bound of a sample in nats: -log p(x | z) of each modality x, and ``beta``
times the divergence of q from the prior N(0, 1). It has thousands of nats where images are of thousands of numbers,
so a ``weight`` of about 1 / numbers makes it comparable to others. Posteriors of several modalities, ``joint``:

* ``product`` (MVAE, arXiv 1802.05335): the product of the Gaussians of the modalities and the prior. The loss is the
  mean of the bounds of all of a sample's modalities, of each one alone and of random ``subsets`` of them, each of
  which generates its own modalities, so one modality is never asked for another by itself.
* ``mixture`` (MMVAE, arXiv 1911.03393): the equal mixture of the Gaussians of the modalities. Each one generates all
  modalities of the sample; the divergence is that of the mixture, estimated by a draw of each component.
* ``mixture_of_products`` (MoPoE, arXiv 2105.02470): the equal mixture of the products of all subsets of the
  modalities that are not empty, as before.

``private``: latent numbers of one modality beside the shared ones, of which its own encoder head alone has a
posterior (DMVAE, arXiv 2012.13024). Where the modality is generated from others they are drawn from the prior.
``total_correlation``: the weight of the total correlation of the shared latent numbers over the samples of the global
microbatch (beta-TCVAE, arXiv 1802.04942, whose beta is 1 more). ``condition``: a conditional autoencoder (Sohn et
al., "Learning Structured Output Representation using Deep Conditional Generative Models", NIPS 2015): prior, encoder
heads and decoders see the vector of a representation, or a field of the sample; samples without it take no part.

Draws, and random subsets, are of the host (``Batch.noise``), functions of seed, position and objective.

Shapes: B samples, M modalities, Q passes (posteriors of a sample that the loss is over), L shared latent numbers, P
joint space, X inputs of an encoder head, W random numbers of a sample.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch, send
from mmmoe_pretrain.config.schedule import schedule_of, value_at
from mmmoe_pretrain.objectives.base import GenerativeModule, ObjectiveModule, Outputs
from mmmoe_pretrain.objectives.domains import scaled
from mmmoe_pretrain.objectives.gaussians import Bounds, Gaussian, standard, total_correlation
from mmmoe_pretrain.objectives.latent_decoder import Decoder, GaussianHead, decoder_flops
from mmmoe_pretrain.objectives.latent_posterior import Posterior, posteriors
from mmmoe_pretrain.objectives.multimodal_vae_settings import PRODUCT, PRODUCTS, MultimodalVAESettings
from mmmoe_pretrain.objectives.pooled import PooledObjective, present
from mmmoe_pretrain.parallel.collectives import gather_rows
from mmmoe_pretrain.parallel.groups import Groups


class MultimodalVAE(PooledObjective):
    """See the module. A sample takes part with any of the modalities."""

    Settings = MultimodalVAESettings

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        settings = self.settings
        self.reconstructs = settings.modalities
        self.reconstructs_given = settings.representation or (settings.field[0] if settings.field else "")
        for name in settings.modalities:
            if not self.modalities[name].fixed_places:
                raise ValueError(
                    f"objectives.{self.name}.modalities {name}: a decoder knows the place of a token by its number, "
                    f"and values of {name} have places of their own; set modalities.{name}.aspect: square"
                )
        self.subsets = list(_subsets(settings.joint, len(settings.modalities)))
        self.passes = len(self.subsets) + settings.random_subsets
        self.noise_size = (
            self.passes * settings.latent_size
            + sum(settings.private.values())
            + settings.random_subsets * len(settings.modalities)
        )

    @property
    def losses(self) -> dict[str, float]:
        settings = self.settings
        found = {f"{self.name}/{name}": settings.weights.get(name, 1.0) for name in settings.modalities}
        found |= {f"{self.name}/kl": 1.0}  # beta is in its value: it may change
        if settings.private:
            found |= {f"{self.name}/kl_private": 1.0}
        if settings.total_correlation:
            found |= {f"{self.name}/total_correlation": settings.total_correlation}
        return found

    def counts(self, batch: Batch) -> dict[str, int]:
        """All are divided by the samples, so that they add up to the bound of a sample."""
        return dict.fromkeys(self.losses, int(self.taking_part(batch).sum()))

    def present(self, batch: Batch) -> Tensor:
        """bool [B, M]: the modalities of the samples that take part."""
        found_BM, condition = present(batch, self.settings.modalities), self.settings.condition
        if condition is None:
            return found_BM
        if self.settings.representation:
            return found_BM & (batch.pooled[condition] >= 0)[:, None]
        return found_BM & self.values(batch).any(dim=1, keepdim=True)

    def taking_part(self, batch: Batch) -> Tensor:
        """bool [B]."""
        return self.present(batch).any(dim=1)

    def values(self, batch: Batch) -> Tensor:
        """bool [B, values]: the value that each sample has of the field of the condition."""
        field, values = self.settings.field
        found = [[meta.get(field) == value for value in values] for meta in batch.metas]
        return send(torch.tensor(found, dtype=torch.bool).view(-1, len(values)), batch.group_ids.device)

    def condition_size(self, embedding_size: int) -> int:
        """Numbers of the condition."""
        if self.settings.condition is None:
            return 0
        return embedding_size if self.settings.representation else len(self.settings.field[1])

    def module(self, embedding_size: int) -> ObjectiveModule:
        return LatentModule(self, embedding_size)

    def needs(self) -> dict[str, set[str]]:
        condition = self.settings.representation
        ways = self.all_representations[condition].ways if condition else [set[str]()]
        return {
            f"{self.name} of {' and '.join([name, *sorted(way)])}": {name} | way
            for name in self.settings.modalities
            for way in ways
        }

    def flops(self, embedding_size: int, samples: float) -> float:
        settings, condition = self.settings, self.condition_size(embedding_size)
        atoms = (1 if settings.joint == PRODUCT else self.passes) if settings.total_correlation else 0
        total = 8.0 * atoms**2 * samples * settings.latent_size  # elementwise, of a sample with those of all
        for number, name in enumerate(settings.modalities):
            own = settings.private.get(name, 0)
            outputs = 2 * (settings.latent_size + own)
            total += 2 * settings.hidden_size * (embedding_size + condition + outputs)
            total += len(self.decoding(number)) * decoder_flops(
                self.modalities[name], settings.latent_size + own + condition, settings.hidden_size,
                settings.decoder_layers, self.vocab_size,
            )  # fmt: skip
        return total

    def decoding(self, number: int) -> list[int]:
        """The passes in which modality ``number`` may be generated."""
        if self.settings.joint != PRODUCT:
            return list(range(self.passes))
        fixed = [q for q, subset in enumerate(self.subsets) if subset[number]]
        return [*fixed, *range(len(self.subsets), self.passes)]

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        condition = self.settings.condition
        also = f" with the condition {condition}" if condition is not None else ""
        name = loss.removeprefix(f"{self.name}/")
        wanted = name if name in self.settings.modalities else " or ".join(self.settings.modalities)
        return (
            f"objectives.{self.name}: {loss} was 0 over {count} samples {so_far}. Give the data samples with {wanted}"
            f"{also}, or set its weight: 0"
        )


def _subsets(joint: str, number: int) -> Iterator[tuple[bool, ...]]:
    """Of modalities, one for each pass that every sample may have."""
    single = [tuple(i == m for i in range(number)) for m in range(number)]
    if joint == PRODUCT:
        yield (True,) * number
    if joint == PRODUCTS:
        yield from (subset for subset in itertools.product((True, False), repeat=number) if any(subset))
    else:
        yield from single


class LatentModule(GenerativeModule):
    """Encoder heads, decoders, and the prior that a condition gives."""

    def __init__(self, objective: MultimodalVAE, embedding_size: int) -> None:
        super().__init__()
        self.objective, self.settings = objective, objective.settings
        self._beta = value_at(schedule_of(self.settings.beta), 0)
        settings, condition = self.settings, objective.condition_size(embedding_size)
        self.prior = GaussianHead(condition, 0, (settings.latent_size,)) if condition else None
        self.register_buffer("subset_QM", torch.tensor(objective.subsets), persistent=False)
        self.parts = nn.ModuleDict()  # called so: initial weights do not depend on the names of modalities
        for name in settings.modalities:
            own = [settings.private[name]] if name in settings.private else []
            sizes = (settings.latent_size, *own)
            encoder = GaussianHead(embedding_size + condition, settings.hidden_size, sizes)
            decoder = Decoder(
                objective.modalities[name], sum(sizes) + condition, settings.hidden_size, settings.decoder_layers,
                objective.vocab_size, settings.deviations.get(name),
            )  # fmt: skip
            self.parts[name] = nn.ModuleDict({"encoder": encoder, "decoder": decoder})

    def begin_step(self, step: int) -> None:
        """See ``ObjectiveModule.begin_step``."""
        self._beta = value_at(schedule_of(self.settings.beta), step)

    def decoder(self, name: str) -> Decoder:
        """Of a modality."""
        found = self.parts[name]
        assert isinstance(found, nn.ModuleDict)
        decoder = found["decoder"]
        assert isinstance(decoder, Decoder)
        return decoder

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        """The sums over this rank's samples."""
        name, settings = self.objective.name, self.settings
        random_QBM = self._random_subsets(batch)
        passes = self.posterior(outputs.features, batch, self.objective.present(batch), random_QBM)
        noise_QBL, own = self._noise(batch)
        z_QBL, weight_QB = passes.shared.at(noise_QBL), passes.weight
        private = {part: passes.private[part].at(noise_BL) for part, noise_BL in own.items()}
        sums: dict[str, Tensor] = {}
        kl_private = weight_QB.new_zeros(())
        for number, part in enumerate(settings.modalities):
            chosen = self.objective.decoding(number)
            share_qB = (weight_QB * self._generated(passes, batch, number))[chosen]
            found_qB = self.log_likelihood(part, z_QBL[chosen], private.get(part), passes.condition, batch)
            sums[f"{name}/{part}"] = -(share_qB * found_qB).sum()
            if part in private:
                kl_B = passes.private[part].kl(standard(private[part]))
                kl_private = kl_private + self._beta * (share_qB * kl_B).sum()
        sums[f"{name}/kl"] = self._beta * (weight_QB * self._divergence(passes, z_QBL)).sum()
        if settings.private:
            sums[f"{name}/kl_private"] = kl_private
        if settings.total_correlation:
            sums[f"{name}/total_correlation"] = self._total_correlation(passes, z_QBL, groups)
        return sums

    def posterior(
        self, features: Mapping[str, Tensor], batch: Batch, seen_BM: Tensor, random_QBM: Tensor | None = None
    ) -> Posterior:
        """Of the modalities ``seen_BM`` of each sample. ``random_QBM``: more subsets."""
        condition_BX = self._condition(features, batch)
        heads = [
            self._encoder(part)(torch.cat([scaled(features[part]), condition_BX], dim=1))
            for part in self.settings.modalities
        ]
        experts = Gaussian(
            *(torch.stack([getattr(head[0], key) for head in heads], dim=1) for key in ("mean", "scale"))
        )
        prior = self.prior(condition_BX)[0] if self.prior is not None else standard(experts.mean[:, 0])
        subset_QM, of_a_product = self.get_buffer("subset_QM"), self.settings.joint == PRODUCT
        shared, subset_QBM, valid_QB = posteriors(experts, prior, subset_QM, seen_BM, random_QBM, of_a_product)
        private = {part: head[1] for part, head in zip(self.settings.modalities, heads, strict=True) if len(head) > 1}
        return Posterior(shared, subset_QBM, valid_QB, private, prior, condition_BX)

    def log_likelihood(
        self, part: str, z_QBL: Tensor, private_BL: Tensor | None, condition_BX: Tensor, batch: Batch
    ) -> Tensor:
        """[Q, B]: of the items of modality ``part``, in nats."""
        return self.decoder(part).log_likelihood(self.inputs(z_QBL, private_BL, condition_BX), batch.originals[part])

    def inputs(self, z_QBL: Tensor, private_BL: Tensor | None, condition_BX: Tensor) -> Tensor:
        """[Q, B, Z]: what a decoder reads."""
        more = [part.expand(len(z_QBL), *part.shape) for part in (private_BL, condition_BX) if part is not None]
        return torch.cat([z_QBL, *more], dim=-1)

    def bounds(
        self, features: Mapping[str, Tensor], batch: Batch, draws: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``GenerativeModule.bounds``; beta is 1, and no likelihood has another weight."""
        passes = self._components(self.posterior(features, batch, self.objective.present(batch)))
        found = []
        for _ in range(draws):
            z_KBL = passes.shared.at(_drawn(passes.shared.mean, generator))
            weight_KB = passes.prior.log_prob(z_KBL) - passes.log_prob(z_KBL)
            for number, part in enumerate(self.settings.modalities):
                own = passes.private.get(part)
                private_BL = None if own is None else own.at(_drawn(own.mean, generator))
                of_part_KB = self.log_likelihood(part, z_KBL, private_BL, passes.condition, batch)
                if own is not None and private_BL is not None:
                    of_part_KB = of_part_KB + standard(private_BL).log_prob(private_BL) - own.log_prob(private_BL)
                weight_KB = weight_KB + of_part_KB * self.objective.present(batch)[:, number]
            found.append(weight_KB)
        bounds = Bounds.of(torch.stack(found), passes.valid)
        return bounds.elbo, bounds.importance, passes.valid.any(dim=0)

    def likelihood_given(
        self,
        target: str,
        seen: Sequence[str],
        features: Mapping[str, Tensor],
        batch: Batch,
        draws: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """See ``GenerativeModule.likelihood_given``."""
        passes, found = self._given(seen, features, batch), []
        for _ in range(draws):
            z_KBL = passes.shared.at(_drawn(passes.shared.mean, generator))
            private_BL = self._prior_of_private(target, z_KBL[0], generator)
            found.append(self.log_likelihood(target, z_KBL, private_BL, passes.condition, batch))
        places = [self.settings.modalities.index(name) for name in {*seen, target}]
        has_all_B = self.objective.present(batch)[:, places].all(dim=1)
        return Bounds.of(torch.stack(found), passes.valid).importance, has_all_B

    def latent(self, seen: Sequence[str], features: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """See ``GenerativeModule.latent``."""
        passes = self._given(seen, features, batch)
        return (passes.shared.mean * passes.weight[..., None]).sum(dim=0)

    def generate(
        self, target: str, z_BL: Tensor, features: Mapping[str, Tensor], batch: Batch, lengths: Sequence[int]
    ) -> list[Tensor]:
        """See ``GenerativeModule.generate``."""
        private_BL = self._prior_of_private(target, z_BL, None)
        z_QBZ = self.inputs(z_BL[None], private_BL, self._condition(features, batch))
        samples_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
        places_N = torch.cat([torch.arange(0), *(torch.arange(length) for length in lengths)])
        decoder = self.decoder(target)
        (found,) = decoder(z_QBZ, samples_N.to(z_BL.device), places_N.to(z_BL.device))
        return list((found.argmax(dim=-1) if decoder.discrete else found).split(list(lengths)))

    def _given(self, seen: Sequence[str], features: Mapping[str, Tensor], batch: Batch) -> Posterior:
        """The components of the posterior of these modalities of each sample; of none, the prior."""
        present_BM = self.objective.present(batch)
        if not seen:
            passes = self._components(self.posterior(features, batch, present_BM))
            prior = Gaussian(passes.prior.mean[None], passes.prior.scale[None])
            return replace(passes.first, shared=prior, valid=passes.valid.any(dim=0, keepdim=True))
        is_seen_M = torch.tensor([name in seen for name in self.settings.modalities], device=present_BM.device)
        return self._components(self.posterior(features, batch, present_BM & is_seen_M))

    def _components(self, passes: Posterior) -> Posterior:
        """The passes that make one posterior: of a product the first, which is of all modalities that are seen."""
        return passes.first if self.settings.joint == PRODUCT else passes

    def _prior_of_private(self, part: str, like: Tensor, generator: torch.Generator | None) -> Tensor | None:
        """[B, its size]: draws of the prior of a modality's own latent numbers, or without a generator its mean."""
        if part not in self.settings.private:
            return None
        zeros = like.new_zeros(len(like), self.settings.private[part])
        return zeros if generator is None else _drawn(zeros, generator)

    def _divergence(self, passes: Posterior, z_QBL: Tensor) -> Tensor:
        """[Q, B]: of each pass from the prior; of a mixture the share of its component, by a draw."""
        if self.settings.joint == PRODUCT:
            return passes.shared.kl(passes.prior)
        return passes.log_prob(z_QBL) - passes.prior.log_prob(z_QBL)

    def _generated(self, passes: Posterior, batch: Batch, number: int) -> Tensor:
        """bool [Q, B]: whether each pass generates modality ``number``."""
        if self.settings.joint == PRODUCT:
            return passes.subset[..., number]
        return self.objective.present(batch)[:, number].expand(len(passes.valid), -1)

    def _total_correlation(self, passes: Posterior, z_QBL: Tensor, groups: Groups) -> Tensor:
        """The sum over samples; of a product of the posteriors of all modalities, of a mixture of all components."""
        passes = self._components(passes)
        rows = [tensor.flatten(0, 1) for tensor in (passes.shared.mean, passes.shared.scale)]
        atoms = Gaussian(*(gather_rows(row, groups.data) for row in rows))
        valid_G = gather_rows(passes.valid.flatten().to(torch.int64), groups.data).bool()
        found_N = total_correlation(z_QBL[: len(passes.valid)].flatten(0, 1), atoms, valid_G)
        return (passes.weight.flatten() * found_N).sum()

    def _encoder(self, part: str) -> GaussianHead:
        found = self.parts[part]
        assert isinstance(found, nn.ModuleDict)
        encoder = found["encoder"]
        assert isinstance(encoder, GaussianHead)
        return encoder

    def _condition(self, features: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """[B, its size]; of none [B, 0]."""
        if self.settings.representation:
            return scaled(features[self.settings.representation])
        if self.settings.field:
            return self.objective.values(batch).float()
        return next(iter(features.values())).new_zeros(len(batch.metas), 0)

    def _noise(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """[Q, B, L] of the shared latent numbers, and [B, its size] by modality."""
        noise_BW, size = batch.noise[self.objective.name], self.settings.latent_size
        sizes = [self.objective.passes * size, *self.settings.private.values()]
        shared_BX, *own = noise_BW[:, : sum(sizes)].split(sizes, dim=1)
        return shared_BX.unflatten(1, (-1, size)).transpose(0, 1), dict(zip(self.settings.private, own, strict=True))

    def _random_subsets(self, batch: Batch) -> Tensor | None:
        """bool [Q, B, M]: each modality with probability one half."""
        count, number = self.settings.random_subsets, len(self.settings.modalities)
        if not count:
            return None
        noise_BX = batch.noise[self.objective.name][:, -count * number :]
        return (noise_BX > 0).unflatten(1, (count, number)).transpose(0, 1)


def _drawn(like: Tensor, generator: torch.Generator) -> Tensor:
    """N(0, 1) on the host, so that every device has the same."""
    return send(torch.randn(like.shape, generator=generator), like.device)
