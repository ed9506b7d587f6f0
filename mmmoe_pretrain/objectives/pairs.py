"""The base of objectives between pairs of representations: which vectors they read, the samples of all ranks, and
losses of a whole step. A kind adds its loss (contrastive.py, sigmoid_contrastive.py).

Features are gathered over the data-parallel ranks, so the negatives are those of the global microbatch. A sample that
lacks one of the two takes no part as a query; samples of the same group (the same thing shown or said again) are
never negatives of each other. The loss of a pair is the mean over the samples of the step that have both.

With ``cached`` the negatives are those of the whole optimizer step, whose microbatches together need not fit in
memory (GradCache, arXiv 2101.06983). The step runs twice. Pass 1, without gradients, collects the features of each
microbatch; then the loss of all of them, and its gradient for each feature, are computed. In pass 2 a surrogate takes
the loss's place and gives features and parameters that gradient. It is exact, as long as both passes compute the
same features.

With ``queue_size`` the features of that many samples of earlier steps are negatives, too: a memory queue (MoCo, arXiv
1911.05722), here without a momentum encoder (XBM, arXiv 1912.06798). They have no gradient. A step whose update is
skipped adds none, and held-out losses do not use them.

Shapes: B samples of a microbatch, G samples of a global microbatch (or step), Q samples of the queue, N = G + Q,
R representations, P joint space.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch, Sample, Segment
from mmmoe_pretrain.config.base import ModalitySettings, ObjectiveSettings, check_pair, sides_of
from mmmoe_pretrain.objectives.base import Expected, Objective, ObjectiveModule, Outputs
from mmmoe_pretrain.parallel.collectives import gather_rows
from mmmoe_pretrain.parallel.groups import Groups

MAX_LOG_SCALE = math.log(100.0)


class PairSettings(ObjectiveSettings):
    """``pairs``: ``a-b`` of two representations (a modality is one), with its weight; a pair that is not named takes
    no part. ``cached``: the negatives are those of the whole step, over all its microbatches. ``queue_size``: samples
    of earlier steps that are negatives, too; whole steps, so that all layouts have the same ones."""

    pairs: dict[str, Annotated[float, Field(ge=0)]] = Field(min_length=1)
    initial_temperature: float = Field(0.07, ge=0.01, le=100)  # it never falls below 0.01
    cached: bool = False
    queue_size: int = Field(0, ge=0)

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

    def batch_problem(self, name: str, global_batch_size: int, num_microbatches: int, data_size: int) -> str | None:
        """See ``ObjectiveSettings.batch_problem``."""
        if self.queue_size % global_batch_size:
            less = self.queue_size // global_batch_size * global_batch_size
            return (
                f"objectives.{name}.queue_size {self.queue_size} is not a multiple of train.global_batch_size "
                f"{global_batch_size}: the queue holds whole steps; use {less} or {less + global_batch_size}"
            )
        parts = 1 if self.cached else num_microbatches
        if not self.on or global_batch_size != parts:
            return None
        remedies = [f"train.global_batch_size {2 * parts} or more"]
        if parts > 1:
            share = global_batch_size // data_size or 1
            fewer = [n for n in range(1, share + 1) if share % n == 0 and n < parts]
            remedies += [f"num_microbatches {fewer}", f"objectives.{name}.cached: true (negatives of the whole step)"]
        return (
            f"train.global_batch_size {global_batch_size} in train.num_microbatches {num_microbatches}: with one "
            f"sample a microbatch objectives.{name} has no negatives and learns nothing from them; "
            f"use {', '.join(remedies)}, or objectives.{name}.weight: 0"
        )


class PairObjective(Objective):
    """Makes the segments of every representation that a pair names. A kind has ``Settings`` and ``module``."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.pairs = {pair: sides_of(pair) for pair in self.settings.pairs}
        self.aligned = tuple(self.pairs.values())
        named = {side for sides in self.pairs.values() for side in sides}
        self.representations = tuple(rep for rep in self.all_representations if rep in named)
        self.whole_step = self.settings.cached

    def segments(self, sample: Sample, rng: np.random.Generator) -> Iterator[Segment]:
        """See ``Objective.segments``."""
        for rep in self.representations:
            yield from self.all_representations[rep].segments(sample, self.name, self.modalities)

    @property
    def losses(self) -> dict[str, float]:
        return {f"{self.name}/{pair}": weight for pair, weight in self.settings.pairs.items()}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {
            f"{self.name}/{pair}": int(((batch.pooled[a] >= 0) & (batch.pooled[b] >= 0)).sum())
            for pair, (a, b) in self.pairs.items()
        }

    def needs(self) -> dict[str, set[str]]:
        found = {}
        for pair, sides in self.pairs.items():
            ways = [a | b for a, b in itertools.product(*(self.all_representations[side].ways for side in sides))]
            for way in ways if self.settings.pairs[pair] else ():
                which = f" of {' and '.join(sorted(way))}" if len(ways) > 1 else ""
                found[f"{self.name} {pair}{which}"] = way
        return found

    def expected(self) -> list[Expected]:
        found: dict[str, Expected] = {}
        for rep in self.representations:
            found |= self.all_representations[rep].expected(self.modalities)
        return list(found.values())

    def flops(self, embedding_size: int, samples: float) -> float:
        candidates = samples + self.settings.queue_size
        return len(self.pairs) * 2 * 2 * embedding_size * candidates  # similarities, either way round

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        pair = loss.removeprefix(f"{self.name}/")
        if not count:
            return (
                f"objectives.{self.name} had no sample with {' and '.join(self.pairs[pair])} {so_far}. Give the data "
                f"such samples, or take {pair} out of its pairs"
            )
        return (
            f"objectives.{self.name} had no negatives for {pair} {so_far}: no sample with both met one of another "
            f"group in its global microbatch. Lower train.num_microbatches, raise train.global_batch_size, set "
            f"objectives.{self.name}.cached: true, or see that not all samples of the data have the same group"
        )


@dataclass(frozen=True)
class Features:
    """The features of this rank's B samples in fp32, of the G samples of all ranks, or of the Q of the queue."""

    rows_BRP: Tensor
    present_BR: Tensor
    group_ids_B: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Features]) -> Features:
        return cls(*(torch.cat(tensors) for tensors in zip(*(part.tensors for part in parts), strict=True)))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows_BRP, self.present_BR, self.group_ids_B


@dataclass(frozen=True)
class Candidates:
    """The queries of this rank, and their candidates: the other side of every sample of all ranks, and of the queue.
    ``own_B``: the place of a query's own other side, as a mask ``is_own_BN``. ``usable_BN``: that and the negatives;
    none of a query that lacks a side (not ``both_B``)."""

    queries_BP: Tensor
    keys_NP: Tensor
    own_B: Tensor
    is_own_BN: Tensor
    usable_BN: Tensor
    both_B: Tensor


@dataclass
class _Cache:
    """The state of a step that runs twice: the features of pass 1, and the gradients for pass 2."""

    seen: list[Features] = field(default_factory=list)
    sums: dict[str, Tensor] | None = None  # of each loss, a microbatch's share
    of_features: list[Tensor] = field(default_factory=list)  # gradients [B, R, P], by microbatch
    of_parameters: list[Tensor] = field(default_factory=list)  # gradients, a microbatch's share


class PairModule(ObjectiveModule):
    """A temperature for each pair, the queue, and the cache of a step that runs twice. A kind has ``one_way``.

    Ranks may split their samples into different microbatches, but each must have as many samples in all, as
    ``collectives.gather_rows`` asks.
    """

    queue_rows: Tensor  # [Q, R, P], the newest first
    queue_present: Tensor  # bool [Q, R]; False where nothing was stored yet
    queue_group_ids: Tensor  # int64 [Q]

    def __init__(self, objective: PairObjective, embedding_size: int) -> None:
        super().__init__()
        self.name, self.sides = objective.name, objective.representations
        self.pairs = objective.pairs
        start = math.log(1.0 / objective.settings.initial_temperature)
        self.log_scale = nn.ParameterDict({pair: nn.Parameter(torch.full((1,), start)) for pair in self.pairs})
        size, sides = objective.settings.queue_size, len(self.sides)
        for name, empty in (
            ("rows", torch.zeros(size, sides, embedding_size)),
            ("present", torch.zeros(size, sides, dtype=torch.bool)),
            ("group_ids", torch.zeros(size, dtype=torch.int64)),
        ):
            self.register_buffer(f"queue_{name}", empty, persistent=size > 0)
        self._cache = _Cache()
        self._stored: list[Features] = []  # of this step, for the queue

    @abc.abstractmethod
    def one_way(self, pair: str, scale: Tensor, among: Candidates) -> Tensor:
        """The sum of the losses of ``pair`` over this rank's queries. ``scale``: one over the temperature."""

    def upper_bounds(self) -> list[tuple[nn.Parameter, float]]:
        return [(scale, MAX_LOG_SCALE) for scale in self.log_scale.values()]

    def forward(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        """The sum of the losses in nats over this rank's samples, by pair; in the second pass of a step that
        runs twice a microbatch's share of it, as a value."""
        if self._cache.sums is not None:
            return self._cache.sums
        return self.sums(self._features(outputs, batch), groups)

    def sums(self, features: Features, groups: Groups) -> dict[str, Tensor]:
        """See ``forward``."""
        everyone = _gather(features, groups)
        queue = self._queue if self.training and len(self.queue_rows) else None
        if queue is not None:
            self._stored.append(Features(everyone.rows_BRP.detach(), everyone.present_BR, everyone.group_ids_B))
        rows = features.group_ids_B.shape[0]
        mine = slice(groups.data_rank * rows, (groups.data_rank + 1) * rows)
        sums = {}
        for pair, (a, b) in self.pairs.items():
            scale = _bounded(self.log_scale[pair]).float().exp()
            one, other = self.sides.index(a), self.sides.index(b)
            ways = (_candidates(everyone, queue, query, key, mine) for query, key in ((one, other), (other, one)))
            there, back = (self.one_way(pair, scale, among) for among in ways)
            sums[f"{self.name}/{pair}"] = 0.5 * (there + back)
        return sums

    def _features(self, outputs: Outputs, batch: Batch) -> Features:
        present_BR = torch.stack([batch.pooled[side] >= 0 for side in self.sides], dim=1)
        return Features(self._rows(outputs), present_BR, batch.group_ids)

    def _rows(self, outputs: Outputs) -> Tensor:
        return torch.stack([outputs.features[side].float() for side in self.sides], dim=1)

    def collect(self, outputs: Outputs, batch: Batch) -> None:
        """The next microbatch of pass 1."""
        assert self._cache.sums is None, "collect after finish: a cache is of one step"
        self._cache.seen.append(self._features(outputs, batch))

    def finish(self, groups: Groups, factors: Mapping[str, float]) -> None:
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

    @property
    def _queue(self) -> Features:
        return Features(self.queue_rows, self.queue_present, self.queue_group_ids)

    def after_step(self, committed: bool) -> None:
        """The step's features become the newest of the queue."""
        stored, self._stored, self._cache = self._stored, [], _Cache()
        if not (committed and stored):
            return
        joined = Features.joined([*stored, self._queue])
        for buffer, values in zip(self._queue.tensors, joined.tensors, strict=True):
            buffer.copy_(values[: len(buffer)])


def _bounded(log_scale: Tensor) -> Tensor:
    """The parameter, brought back in place where it passed the bound: a clamp in the graph would
    have no gradient there, and it would stay for good."""
    with torch.no_grad():
        log_scale.clamp_(max=MAX_LOG_SCALE)
    return log_scale


def _gather(features: Features, groups: Groups) -> Features:
    """Of the global microbatch, G = ranks * B samples."""
    flags = torch.cat([features.present_BR.to(torch.int64), features.group_ids_B[:, None]], dim=1)
    flags_G = gather_rows(flags, groups.data)
    return Features(gather_rows(features.rows_BRP, groups.data), flags_G[:, :-1].bool(), flags_G[:, -1])


def _candidates(everyone: Features, queue: Features | None, query: int, key: int, mine: slice) -> Candidates:
    keys = everyone if queue is None else Features.joined([everyone, queue])
    both_G = everyone.present_BR[:, query] & everyone.present_BR[:, key]
    places_N = torch.arange(len(keys.group_ids_B), device=both_G.device)
    own_B, both_B = places_N[mine], both_G[mine]
    is_own_BN = places_N == own_B[:, None]
    same_BN = everyone.group_ids_B[mine, None] == keys.group_ids_B
    usable_BN = keys.present_BR[:, key] & (~same_BN | is_own_BN) & both_B[:, None]
    return Candidates(everyone.rows_BRP[mine, query], keys.rows_BRP[:, key], own_B, is_own_BN, usable_BN, both_B)
