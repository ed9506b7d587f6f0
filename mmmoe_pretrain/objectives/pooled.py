"""The base of objectives over pooled representations: the vectors of a sample that they read, the samples of all
ranks, and losses of a whole step; and of those among them that have a loss for each pair of representations.

Features are gathered over the data-parallel ranks, so a loss is over the samples of the global microbatch. It is a
sum over terms, and divided by their number in the step.

With ``cached`` it is over the whole optimizer step, whose microbatches together need not fit in
memory (GradCache, arXiv 2101.06983). The step runs twice. Pass 1, without gradients, collects the features of each
microbatch; then the loss of all of them, and its gradient for each feature, are computed. In pass 2 a surrogate takes
the loss's place and gives features and parameters that gradient. It is exact, as long as both passes compute the
same features.

Shapes: B samples of a microbatch, R representations, P joint space.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmmoe_pretrain.batch import Batch, Sample, Segment
from mmmoe_pretrain.config.base import ModalitySettings, ObjectiveSettings, check_pair, sides_of
from mmmoe_pretrain.kinds import nearest
from mmmoe_pretrain.objectives.base import Expected, Objective, ObjectiveModule, Outputs, Representation
from mmmoe_pretrain.parallel.collectives import gather_rows
from mmmoe_pretrain.parallel.groups import Groups


class CachedSettings(ObjectiveSettings):
    """``cached``: the loss is over the samples of the whole step, and not of each global microbatch."""

    cached: bool = False


class PooledSettings(ObjectiveSettings):
    """Of representations that the settings name."""

    @property
    def named(self) -> tuple[str, ...]:
        """The representations that it reads."""
        raise NotImplementedError


class OneRepresentationSettings(PooledSettings):
    """``of``: the representation (a modality is one)."""

    of: str

    @property
    def named(self) -> tuple[str, ...]:
        """See ``PooledSettings.named``."""
        return (self.of,)

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """See ``ObjectiveSettings.check_names``."""
        if self.of not in representations:
            known = nearest(self.of, representations, "there are")
            raise ValueError(f"objectives.{name}.of {self.of}: there is no such representation; {known}")


class PairwiseSettings(PooledSettings):
    """``pairs``: ``a-b`` of two representations (a modality is one), with its weight; a pair that is not named takes
    no part."""

    pairs: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)

    @property
    def named(self) -> tuple[str, ...]:
        """See ``PooledSettings.named``."""
        return tuple(side for pair in self.pairs for side in sides_of(pair))

    @property
    def on(self) -> bool:
        """See ``ObjectiveSettings.on``; some pair must have a weight, too."""
        return super().on and any(self.pairs.values())

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """See ``ObjectiveSettings.check_names``."""
        for pair in self.pairs:
            check_pair(pair, representations, f"objectives.{name}.pairs")


class PooledObjective(Objective):
    """Makes the segment of every representation that its settings name. A kind has ``Settings`` and ``module``."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        named = self.settings.named
        self.representations = tuple(rep for rep in self.all_representations if rep in named)
        self.whole_step = isinstance(self.settings, CachedSettings) and self.settings.cached

    def segments(self, sample: Sample, rng: np.random.Generator) -> Iterator[Segment]:
        """See ``Objective.segments``."""
        for rep in self.representations:
            yield from self.all_representations[rep].segments(sample, self.name, self.modalities, rng)

    def expected(self) -> list[Expected]:
        found: dict[str, Expected] = {}
        for rep in self.representations:
            found |= self.all_representations[rep].expected(self.modalities)
        return list(found.values())

    def ways(self, pair: str, sides: Sequence[str]) -> dict[str, set[str]]:
        """As ``Objective.needs``: the modalities by which a sample has all of ``sides``, in each way."""
        ways = [
            set.union(*way) for way in itertools.product(*(self.all_representations[side].ways for side in sides))
        ]
        which = [f" of {' and '.join(sorted(way))}" if len(ways) > 1 else "" for way in ways]
        return {f"{self.name} {pair}{its}": way for its, way in zip(which, ways, strict=True)}


class PairwiseObjective(PooledObjective):
    """Has a loss for each pair, over the samples that have both."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.pairs = {pair: sides_of(pair) for pair in self.settings.pairs}

    @property
    def losses(self) -> dict[str, float]:
        return {f"{self.name}/{pair}": weight for pair, weight in self.settings.pairs.items()}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {
            f"{self.name}/{pair}": int(((batch.pooled[a] >= 0) & (batch.pooled[b] >= 0)).sum())
            for pair, (a, b) in self.pairs.items()
        }

    def needs(self) -> dict[str, set[str]]:
        pairs = [(pair, sides) for pair, sides in self.pairs.items() if self.settings.pairs[pair]]
        return {what: way for pair, sides in pairs for what, way in self.ways(pair, sides).items()}

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        if count:
            return super().why_idle(loss, count, so_far)
        pair = loss.removeprefix(f"{self.name}/")
        return (
            f"objectives.{self.name} had no sample with {' and '.join(self.pairs[pair])} {so_far}. Give the data "
            f"such samples, or take {pair} out of its pairs"
        )


@dataclass(frozen=True)
class Features:
    """The features of this rank's B samples in fp32, or of those of all ranks."""

    rows_BRP: Tensor
    present_BR: Tensor
    group_ids_B: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        return cls(*(torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True)))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows_BRP, self.present_BR, self.group_ids_B


@dataclass
class _Cache:
    """The state of a step that runs twice: the features of pass 1, and the gradients for pass 2."""

    seen: list[Features] = field(default_factory=list)
    sums: dict[str, Tensor] | None = None  # of each loss, a microbatch's share
    of_features: list[Tensor] = field(default_factory=list)  # gradients [B, R, P], by microbatch
    of_parameters: list[Tensor] = field(default_factory=list)  # gradients, a microbatch's share


class PooledModule(ObjectiveModule):
    """The cache of a step that runs twice. A kind has ``sums``.

    Ranks may split their samples into different microbatches, but each must have as many samples in all, as
    ``collectives.gather_rows`` asks.
    """

    def __init__(self, objective: PooledObjective) -> None:
        super().__init__()
        self.name, self.sides = objective.name, objective.representations
        self._cache = _Cache()

    @abc.abstractmethod
    def sums(self, features: Features, groups: Groups) -> dict[str, Tensor]:
        """The losses of this rank's samples, ``features``, among those of all ranks: scalars."""

    def vectors(self, outputs: Outputs) -> Mapping[str, Tensor]:
        """[B, P] by representation: what the loss is of."""
        return outputs.features

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        """The sums of the losses over this rank's samples; in the second pass of a step that runs twice a
        microbatch's share of them, as values."""
        if self._cache.sums is not None:
            return self._cache.sums
        return self.sums(self._features(outputs, batch), groups)

    def _features(self, outputs: Outputs, batch: Batch) -> Features:
        return Features(self._rows(outputs), present(batch, self.sides), batch.group_ids)

    def _rows(self, outputs: Outputs) -> Tensor:
        return stacked(self.vectors(outputs), self.sides)

    def collect(self, outputs: Outputs, batch: Batch) -> None:
        """The next microbatch of pass 1."""
        assert self._cache.sums is None, "collect after finish: a cache is of one step"
        self._cache.seen.append(self._features(outputs, batch))

    def finish(self, groups: Groups, factors: Mapping[str, float | Tensor]) -> None:
        """Between the passes: the loss of all that was collected. No parameter gets a gradient here."""
        seen, self._cache.seen = self._cache.seen, []
        leaves, count = [part.rows_BRP.detach().requires_grad_() for part in seen], len(seen)
        with torch.enable_grad():
            whole = Features.joined([replace(part, rows_BRP=leaf) for part, leaf in zip(seen, leaves, strict=True)])
            sums = self.sums(whole, groups)
            total = torch.stack([factors[loss] * value for loss, value in sums.items()]).sum()
            found = torch.autograd.grad(total, [*leaves, *self.parameters()])
        self._cache.of_features = list(found[:count])
        self._cache.of_parameters = [gradient / count for gradient in found[count:]]
        self._cache.sums = {loss: value.detach() / count for loss, value in sums.items()}

    def surrogate(self, outputs: Outputs) -> Tensor:
        """For the next microbatch of pass 2: a scalar of value 0 that replaces the weighted losses.

        Its sum over the microbatches has the gradient of this rank's loss: a feature's comes from its own
        microbatch, and a parameter's from each in equal parts, since engines may wait for it in each.
        """
        total = (self._rows(outputs) * self._cache.of_features.pop(0)).sum()
        for parameter, grad in zip(self.parameters(), self._cache.of_parameters, strict=True):
            total = total + (parameter * grad).sum()
        return total - total.detach()

    def after_step(self, committed: bool) -> None:
        """The next step begins as a new one."""
        self._cache = _Cache()


def present(batch: Batch, sides: Sequence[str]) -> Tensor:
    """bool [B, R]: the samples that have each of these representations."""
    return torch.stack([batch.pooled[side] >= 0 for side in sides], dim=1)


def has_all_parts(batch: Batch, representation: Representation, modalities: Sequence[str]) -> Tensor:
    """bool [B]: the samples that have every part of ``representation``. ``modalities``: those of the run in order."""
    name = representation.name
    if representation.settings.missing == "skip" or not representation.settings.joined:
        return present(batch, (name, *representation.segment_names)).all(dim=1)
    segment_n, modality_n = batch.segment_ids[: batch.num_valid], batch.modality_ids[: batch.num_valid]
    found_B = batch.pooled[name] >= 0
    for part in representation.modalities:
        tokens_S = segment_n.new_zeros(batch.num_segments + 1)  # the last one is of samples without a segment
        tokens_S.index_add_(0, segment_n, (modality_n == modalities.index(part)).to(tokens_S.dtype))
        found_B = found_B & (tokens_S[batch.pooled[name]] > 0)
    return found_B


def stacked(vectors: Mapping[str, Tensor], sides: Sequence[str]) -> Tensor:
    """[B, R, P] in fp32, of [B, P] by representation."""
    return torch.stack([vectors[side].float() for side in sides], dim=1)


def gather(features: Features, groups: Groups) -> Features:
    """Of the samples of all ranks."""
    flags = torch.cat([features.present_BR.to(torch.int64), features.group_ids_B[:, None]], dim=1)
    flags_G = gather_rows(flags, groups.data)
    return Features(gather_rows(features.rows_BRP, groups.data), flags_G[:, :-1].bool(), flags_G[:, -1])
