"""The base classes of objective kinds. ``Objective`` runs on the host, in numpy: it makes the segments of a sample
and counts the terms of its losses in a batch. ``ObjectiveModule`` is on the last pipeline stage and computes losses
from the model's outputs. A loss is a sum over its terms; it is divided by their number in the whole step.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mmmoe_pretrain.batch import OF_TOKENIZER, Batch, Item, Part, Sample, Segment
from mmmoe_pretrain.config.base import ObjectiveSettings, RepresentationSettings
from mmmoe_pretrain.modalities import Modality
from mmmoe_pretrain.parallel.groups import Groups


@dataclass(frozen=True)
class Representation:
    """One vector of a sample: of the segment or segments that hold the first items of ``modalities``, whose tokens
    attend to each other in both directions within a segment. Its kind (``kinds.REPRESENTATIONS``) has the module that
    makes a vector of them; this is the host half."""

    name: str
    settings: RepresentationSettings

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.settings.parts

    @property
    def segment_names(self) -> tuple[str, ...]:
        """The representations whose segments it is made of: itself, or each of its modalities."""
        return (self.name,) if self.settings.joined else self.modalities

    @property
    def ways(self) -> list[set[str]]:
        """Sets of modalities of which a sample must have one to have such a vector."""
        if self.settings.missing == "skip":
            return [set(self.modalities)]
        return [{name} for name in self.modalities]

    def items(self, sample: Sample) -> dict[str, int]:
        """The numbers of its items, by modality; empty if ``sample`` has no such vector."""
        found = {name: item for name in self.modalities if (item := sample.index(name)) is not None}
        return found if any(way <= found.keys() for way in self.ways) else {}

    def segments(
        self, sample: Sample, task: str, all_of: Mapping[str, Modality], rng: np.random.Generator
    ) -> list[Segment]:
        """Its segments of ``sample``, for ``task``; none if the sample has no such vector. ``rng``: of views."""
        parts = {name: self._part(sample, i, all_of[name], rng) for name, i in self.items(sample).items()}
        if self.settings.joined:
            return [Segment(task, tuple(parts.values()), self.name)] if parts else []
        return [Segment(task, (part,), name) for name, part in parts.items()]

    def _part(self, sample: Sample, item: int, modality: Modality, rng: np.random.Generator) -> Part:
        value = sample.items[item].value
        if not self.settings.changes:
            return Part(item, 0, modality.num_tokens(value))
        for name in self.settings.changes:
            value = modality.transforms[name](value, rng)
        return Part(item, 0, modality.num_tokens(value), view=value)

    def check(self, modalities: Mapping[str, Modality]) -> None:
        """Raises ValueError where a modality has no such transform, or other tokens than the settings say."""
        self.settings.check_tokens(self.name, modalities)
        for part in self.modalities:
            known = modalities[part].transforms
            if unknown := [name for name in self.settings.changes if name not in known]:
                raise ValueError(
                    f"representations.{self.name}.transforms {', '.join(unknown)}: modality {part} has "
                    f"{', '.join(known) or 'none'}; name of these"
                )

    def expected(self, modalities: Mapping[str, Modality]) -> dict[str, Expected]:
        """By ``segment_names``; see ``Expected``."""
        tokens = [(name, modalities[name].max_tokens) for name in self.modalities]
        if self.settings.joined:
            return {self.name: Expected(1.0, tuple(tokens))}
        return {name: Expected(1.0, ((name, count),)) for name, count in tokens}


def num_tokens(sample: Sample, item: int, modalities: Mapping[str, Modality]) -> int:
    """The tokens of item number ``item``."""
    return modalities[sample.items[item].modality].num_tokens(sample.items[item].value)


@dataclass(frozen=True)
class Expected:
    """Segments that a sample with every modality at its full length has, for estimates of costs: ``count`` of them
    with ``tokens`` each by modality, of which ``targets`` are predicted and the last ``causal`` attend causally.
    ``contents``: numbers of contents that are predicted. ``left_out``: tokens that a decoder predicts, of each
    modality. ``targets_of``: the targets by modality, where they are known."""

    count: float
    tokens: tuple[tuple[str, int], ...]
    targets: float = 0
    causal: int = 0
    contents: float = 0
    left_out: tuple[float, ...] = ()
    targets_of: tuple[tuple[str, float], ...] = field(default=(), compare=False)

    @property
    def length(self) -> int:
        return sum(tokens for _, tokens in self.tokens)

    @property
    def scores(self) -> float:
        """Pairs of query and key: tokens before the causal ones attend to each other, the n-th causal token to all of
        these and to n causal ones."""
        return (self.length - self.causal) * self.length + self.causal * (self.causal + 1) / 2


class Objective(abc.ABC):
    """One objective of a run: a kind under the user's ``name`` with its ``settings``.

    ``representations``: names of those that its module reads. ``aligned``: pairs of them that it brings into
    one space; ``correlated``: into spaces that are alike up to a linear map. ``predicts``: its segments have targets;
    ``head``: the name of the language head that predicts them, None of the one without a name.
    ``hidden``: modalities of which it hides tokens; ``contents``: of its losses those of their contents, each with
    its modality; ``decoder_layers``: of the decoder that predicts these, if their tokens are not in the stream.
    ``classes``: names of those that it tells apart, by a head of its own on its one representation.
    ``anchor_size``: numbers of a sample's ``anchor``. ``completed``: the representations that it reads, and the one
    that it predicts from them. ``generates``: modalities whose values it can generate token by token.
    ``reconstructs``: the modalities that it generates from latent numbers, of which a batch has the ``originals``;
    ``reconstructs_given``: what it is told beside, by name, or nothing. ``noise_size``: random numbers that a batch
    has for each sample, functions of the run's seed, the sample's global position and the objective. ``vocab_size``:
    of the run's tokenizer, where its module is made.
    """

    Settings: ClassVar[type[ObjectiveSettings]]
    causal: ClassVar[bool] = False  # some segments are
    whole_step: bool = False  # its loss is of the whole step, whose microbatches run twice
    representations: tuple[str, ...] = ()
    aligned: tuple[tuple[str, str], ...] = ()
    correlated: tuple[tuple[str, str], ...] = ()
    predicts: bool = False  # tokens: of modalities in ``predicted``
    head: str | None = None
    hidden: tuple[str, ...] = ()
    contents: Mapping[str, str] = MappingProxyType({})
    decoder_layers: int = 0
    classes: tuple[str, ...] = ()
    anchor_size: int = 0
    completed: tuple[tuple[str, ...], str] | None = None
    reconstructs: tuple[str, ...] = ()
    reconstructs_given: str = ""
    noise_size: int = 0
    vocab_size: int = 0
    generates: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        settings: Any,
        modalities: Mapping[str, Modality],
        representations: Mapping[str, Representation],
    ) -> None:
        self.name, self.settings = name, settings
        self.modalities, self.all_representations = modalities, representations

    @abc.abstractmethod
    def segments(self, sample: Sample, rng: np.random.Generator) -> Iterator[Segment]:
        """The segments of ``sample`` to pack. ``rng`` is a function of the run's seed, the sample's global position
        and the objective. A representation is packed once, for the first objective that asks for it, so ``pooled`` of
        a batch may have samples that this objective did not ask for: ``counts`` and the loss leave those out."""

    def anchor(self, sample: Sample) -> np.ndarray | None:
        """Where it has an ``anchor_size``: a vector of ``sample`` as a target, float32 [anchor_size], or None."""
        raise NotImplementedError

    def generating(self, modality: str) -> Objective:
        """Of a modality that it ``generates``: this objective with segments that end with a value of it, of every
        sample that has one."""
        raise NotImplementedError

    def split(self, sample: Sample) -> tuple[tuple[Item, ...], Item] | None:
        """Of an objective that ``generates``: the items of ``sample`` that may stand before the value that is
        generated, and that value; None where it has none."""
        raise NotImplementedError

    def class_features(self, module: ObjectiveModule, names: Sequence[str]) -> np.ndarray:
        """Where it has an ``anchor_size``: float32 [classes, P], whose products with the features of its
        representations score the classes called ``names``; zeros for a name that has no anchor."""
        raise NotImplementedError

    def complete(self, module: ObjectiveModule, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """Where it has a ``completed``: float32 [N, P] unit rows, the vectors that it predicts from ``features``
        [N, P] of other representations."""
        raise NotImplementedError

    @property
    def predicted(self) -> tuple[str, ...]:
        """The modalities whose tokens it predicts."""
        return tuple(name for name, its in self.modalities.items() if its.predictable and self.predicts)

    @property
    def vocabularies(self) -> tuple[str, ...]:
        """Of its targets (``batch.Targets``)."""
        own = (name if self.modalities[name].settings.vocabulary else OF_TOKENIZER for name in self.predicted)
        return tuple(dict.fromkeys(own))

    @property
    @abc.abstractmethod
    def losses(self) -> dict[str, float]:
        """Its losses by name, in a fixed order, each with its weight in the objective's; names begin with its own."""

    def labels(self, batch: Batch) -> Tensor:
        """Where it has ``classes``: int64 [B], the class of each sample that takes part, else -1."""
        raise NotImplementedError

    @abc.abstractmethod
    def counts(self, batch: Batch) -> dict[str, int]:
        """How many terms each loss has in ``batch``."""

    @abc.abstractmethod
    def module(self, embedding_size: int) -> ObjectiveModule:
        """Its module on the last stage, for features [B, embedding_size]."""

    @abc.abstractmethod
    def needs(self) -> dict[str, set[str]]:
        """The modalities that a sample must have to serve it, one set for each way, by what an error calls it."""

    @abc.abstractmethod
    def expected(self) -> list[Expected]:
        """See ``Expected``."""

    def flops(self, embedding_size: int, samples: float) -> float:
        """FLOPs a sample of its loss beside heads, with ``samples`` that it is computed over at a time."""
        return 0.0

    def share(self, loss: str) -> float:
        """The share of the samples that ``loss`` may use."""
        return 1.0

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        """What to do about a loss that was 0 ``so_far`` ("in 10 steps"), over ``count`` terms."""
        return (
            f"objectives.{self.name} had {count} terms {so_far}. Give the data samples for it, or set its weight: 0"
        )


@dataclass(frozen=True)
class Outputs:
    """The outputs of the last stage. ``hidden_nD``: the trunk's output. ``features``: by representation, [B, P] unit
    rows in fp32, zero where the sample has none. ``token_nll``: by task, [N] negative log-likelihood (nats, fp32) of
    each of its targets. ``contents``: by loss, [N, C] predictions in fp32 of the contents of hidden tokens.
    ``projected``: ``features`` before they get unit length. ``terms``: by representation with balanced parts, in
    training, the [P, B, width] without a gradient whose sum over the parts ``projected`` is. ``class_logits``: by
    task that has classes, [B, C] in fp32."""

    hidden_nD: Tensor
    features: dict[str, Tensor]
    token_nll: dict[str, Tensor]
    contents: dict[str, Tensor]
    projected: dict[str, Tensor]
    terms: dict[str, Tensor] = field(default_factory=dict)
    class_logits: dict[str, Tensor] = field(default_factory=dict)


class ObjectiveModule(nn.Module):
    """Parameters and loss of an objective. ``forward`` runs on every rank, also where a batch has nothing for it, and
    gives every loss by name: the sum over this rank's terms, in a graph with all of the module's parameters.
    Persistent buffers are saved with the run. They must be equal on all ranks; ``after_step`` alone writes them."""

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        raise NotImplementedError

    def upper_bounds(self) -> list[tuple[nn.Parameter, float]]:
        """Parameters that the loss keeps below a bound, in place."""
        return []

    def begin_step(self, step: int) -> None:
        """Before each pass of optimizer step ``step`` (from 0)."""

    def after_step(self, committed: bool) -> None:
        """The step is over. ``committed``: weights were updated; else it was skipped, or of held-out samples."""

    def teach(self, outputs: Outputs, batch: Batch, groups: Groups) -> None:
        """Where ``Settings.taught``: before the passes of a step, each of its microbatches in their order, with the
        outputs of the model that has the average of the weights, this module's included; without gradients."""
        raise NotImplementedError

    def progress(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        """By representation of ``outputs.terms`` that ``Settings.scored`` names, [P + 1] without a gradient: over
        this rank's samples that have every part, the sums of the probability that each part alone gives to the true
        other side, and the number of these samples. Collective."""
        return {}

    # Of an objective whose loss is of the whole step, in this order: collect each microbatch without gradients,
    # finish, then forward (values alone) and surrogate of each microbatch, in the same order.

    def collect(self, outputs: Outputs, batch: Batch) -> None:
        raise NotImplementedError

    def finish(self, groups: Groups, factors: Mapping[str, float | Tensor]) -> None:
        """``factors``: of each loss, that its sum is multiplied by."""
        raise NotImplementedError

    def surrogate(self, outputs: Outputs) -> Tensor:
        """A scalar of value 0 with the gradient of the step's loss."""
        raise NotImplementedError


class GenerativeModule(ObjectiveModule):
    """Of an objective that ``reconstructs``: what evaluation asks of it. ``features`` by representation, [B, P], of
    the samples of ``batch``, which has ``originals``. A latent vector [B, L] is what modalities of a sample share."""

    def bounds(
        self, features: Mapping[str, Tensor], batch: Batch, draws: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[B] each: lower bounds of log p of all modalities of a sample, in nats: the evidence lower bound and the
        importance-weighted one of ``draws``; and bool, the samples that take part."""
        raise NotImplementedError

    def likelihood_given(
        self,
        target: str,
        seen: Sequence[str],
        features: Mapping[str, Tensor],
        batch: Batch,
        draws: int,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """[B] each: log of the mean likelihood of the ``target`` over ``draws`` of the posterior of the modalities
        ``seen`` (none: of the prior), in nats; and bool, the samples that have all of them."""
        raise NotImplementedError

    def latent(self, seen: Sequence[str], features: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """[B, L]: the mean of the posterior of the modalities ``seen``."""
        raise NotImplementedError

    def generate(
        self, target: str, z_BL: Tensor, features: Mapping[str, Tensor], batch: Batch, lengths: Sequence[int]
    ) -> list[Tensor]:
        """By sample, the most likely content of as many tokens (``lengths``) of modality ``target``: as that of
        ``Originals``. What is of that modality alone is at the mean of the prior."""
        raise NotImplementedError
