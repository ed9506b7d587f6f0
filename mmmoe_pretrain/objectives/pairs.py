"""The base of objectives that contrast the two of a pair of representations with negatives: temperatures,
candidates and the queue. A kind adds its loss (contrastive.py, sigmoid_contrastive.py).

The negatives are those of the global microbatch, or with ``cached`` of the whole step (pooled.py). A sample that
lacks one of the two takes no part as a query; samples of the same group (the same thing shown or said again) are
never negatives of each other. The loss of a pair is the mean over the samples of the step that have both.

With ``queue_size`` the features of that many samples of earlier steps are negatives, too: a memory queue, of the
model's own features (XBM, arXiv 1912.06798), or with ``queue_from_average`` of those of the model with the average of
its weights, which changes slowly (the momentum encoder of MoCo, arXiv 1911.05722). They have no gradient. A step
whose update is skipped adds none, and held-out losses do not use them.

Shapes: B samples of a microbatch, G samples of a global microbatch (or step), Q samples of the queue, N = G + Q,
R representations, P joint space, U parts of a representation.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config.base import StepSizes, sides_of
from mmmoe_pretrain.objectives.base import Outputs
from mmmoe_pretrain.objectives.pooled import (
    CachedSettings,
    Features,
    PairwiseObjective,
    PairwiseSettings,
    PooledModule,
    gather,
    present,
)
from mmmoe_pretrain.parallel.groups import Groups

MAX_LOG_SCALE = math.log(100.0)


class PairSettings(PairwiseSettings, CachedSettings):
    """``cached``: the negatives are those of the whole step, over all its microbatches. ``queue_size``: samples
    of earlier steps that are negatives, too; whole steps, so that all layouts have the same ones.
    ``queue_from_average``: their features are those of the average of the weights (``optimizer.average``).
    ``queue_start``: the optimizer step (the first is 0) from which on they are stored; early in training a model's
    own features of earlier steps are unlike those of the step."""

    initial_temperature: float = Field(0.07, ge=0.01, le=100)  # it never falls below 0.01
    queue_size: int = Field(0, ge=0, le=1 << 20)
    queue_from_average: bool = False
    queue_start: int = Field(0, ge=0)

    @property
    def taught(self) -> bool:
        """See ``ObjectiveSettings.taught``."""
        return self.queue_from_average

    @property
    def scored(self) -> tuple[str, ...]:
        """See ``ObjectiveSettings.scored``."""
        return tuple(side for pair, weight in self.pairs.items() if weight for side in sides_of(pair))

    @model_validator(mode="after")
    def _has_a_queue(self) -> Self:
        unused = [key for key in ("queue_from_average", "queue_start") if getattr(self, key) and not self.queue_size]
        if unused:
            raise ValueError(f"{unused[0]} without a queue; set queue_size, e.g. 8 times train.global_batch_size")
        return self

    def batch_problem(self, name: str, sizes: StepSizes) -> str | None:
        """See ``ObjectiveSettings.batch_problem``."""
        if self.queue_size % sizes.global_batch_size:
            less = self.queue_size // sizes.global_batch_size * sizes.global_batch_size
            return (
                f"objectives.{name}.queue_size {self.queue_size} is not a multiple of train.global_batch_size "
                f"{sizes.global_batch_size}: the queue holds whole steps; use {less} or "
                f"{less + sizes.global_batch_size}"
            )
        parts = 1 if self.cached else sizes.num_microbatches
        # With a queue the first step alone has no negatives.
        if not self.on or self.queue_size or sizes.global_batch_size != parts:
            return None
        remedies = [f"train.global_batch_size {2 * parts} or more"]
        if parts > 1:
            fewer = [n for n in sizes.legal_microbatches if n < parts]
            remedies += [f"num_microbatches {fewer}", f"objectives.{name}.cached: true (negatives of the whole step)"]
        return (
            f"train.global_batch_size {sizes.global_batch_size} in train.num_microbatches {sizes.num_microbatches}: "
            f"with one sample a microbatch objectives.{name} has no negatives and learns nothing from them; "
            f"use {', '.join(remedies)}, or objectives.{name}.weight: 0"
        )


class PairObjective(PairwiseObjective):
    """A kind has ``Settings`` and ``module``."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.aligned = tuple(self.pairs.values())

    def flops(self, embedding_size: int, samples: float) -> float:
        candidates = samples + self.settings.queue_size
        return len(self.pairs) * 2 * 2 * embedding_size * candidates  # similarities, either way round

    def why_idle(self, loss: str, count: int, so_far: str) -> str:
        if not count:
            return super().why_idle(loss, count, so_far)
        pair = loss.removeprefix(f"{self.name}/")
        return (
            f"objectives.{self.name} had no negatives for {pair} {so_far}: no sample with both met one of another "
            f"group in its global microbatch. Lower train.num_microbatches, raise train.global_batch_size, set "
            f"objectives.{self.name}.cached: true, or see that not all samples of the data have the same group"
        )


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


class PairModule(PooledModule):
    """A temperature for each pair, and the queue. A kind has ``one_way``."""

    queue_rows: Tensor  # [Q, R, P], the newest first
    queue_present: Tensor  # bool [Q, R]; False where nothing was stored yet
    queue_group_ids: Tensor  # int64 [Q]

    def __init__(self, objective: PairObjective, embedding_size: int) -> None:
        super().__init__(objective)
        self.pairs, self.weights = objective.pairs, objective.settings.pairs
        self.parts = {name: objective.all_representations[name].modalities for name in self.sides}
        start = math.log(1.0 / objective.settings.initial_temperature)
        self.log_scale = nn.ParameterDict({pair: nn.Parameter(torch.full((1,), start)) for pair in self.pairs})
        size, sides = objective.settings.queue_size, len(self.sides)
        for name, empty in (
            ("rows", torch.zeros(size, sides, embedding_size)),
            ("present", torch.zeros(size, sides, dtype=torch.bool)),
            ("group_ids", torch.zeros(size, dtype=torch.int64)),
        ):
            self.register_buffer(f"queue_{name}", empty, persistent=size > 0)
        self.taught, self.start = objective.settings.taught, objective.settings.queue_start
        self._step = 0
        self._stored: list[Features] = []  # of this step, for the queue

    @abc.abstractmethod
    def one_way(self, pair: str, scale: Tensor, among: Candidates) -> Tensor:
        """The sum of the losses of ``pair`` over this rank's queries. ``scale``: one over the temperature."""

    def upper_bounds(self) -> list[tuple[nn.Parameter, float]]:
        return [(scale, MAX_LOG_SCALE) for scale in self.log_scale.values()]

    def sums(self, features: Features, groups: Groups) -> dict[str, Tensor]:
        """In nats, by pair; see ``PooledModule.sums``."""
        everyone = gather(features, groups)
        queue = self._queue if self.training and len(self.queue_rows) else None
        if queue is not None and not self.taught:
            self._store(everyone)
        rows = features.group_ids_B.shape[0]
        mine = slice(groups.data_rank * rows, (groups.data_rank + 1) * rows)
        keys = everyone if queue is None else Features.joined([everyone, queue])
        sums = {}
        for pair, (a, b) in self.pairs.items():
            scale = _bounded(self.log_scale[pair]).float().exp()
            one, other = self.sides.index(a), self.sides.index(b)
            ways = (_candidates(everyone, keys, query, key, mine) for query, key in ((one, other), (other, one)))
            there, back = (self.one_way(pair, scale, among) for among in ways)
            sums[f"{self.name}/{pair}"] = 0.5 * (there + back)
        return sums

    def teach(self, outputs: Outputs, batch: Batch, groups: Groups) -> None:
        """See ``ObjectiveModule.teach``: the features for the queue."""
        everyone = gather(self._features(outputs, batch), groups)
        if self.training:
            self._store(everyone)

    def begin_step(self, step: int) -> None:
        self._step = step

    def _store(self, everyone: Features) -> None:
        if self._step < self.start:
            return
        self._stored.append(Features(everyone.rows_BRP.detach(), everyone.present_BR, everyone.group_ids_B))

    @torch.no_grad()
    def progress(self, outputs: Outputs, batch: Batch, groups: Groups) -> dict[str, Tensor]:
        """See ``ObjectiveModule.progress``. Candidates are those of the global microbatch, also with ``cached`` or a
        queue; the softmax over them is that of ``contrastive``, whatever the kind."""
        terms = {name: value for name, value in outputs.terms.items() if name in self.sides}
        if not terms:
            return {}
        features = self._features(outputs, batch)
        everyone, rows = gather(features, groups), len(features.group_ids_B)
        mine = slice(groups.data_rank * rows, (groups.data_rank + 1) * rows)
        found = {name: terms[name].new_zeros(len(terms[name]) + 1, dtype=torch.float64) for name in terms}
        for pair, names in self.pairs.items():
            scale = self.log_scale[pair].float().exp()
            for name, other in (names, names[::-1]):
                if name not in terms or not self.weights[pair]:
                    continue
                among = _candidates(everyone, everyone, self.sides.index(name), self.sides.index(other), mine)
                length_B = outputs.projected[name].float().norm(dim=-1).clamp(min=1e-6)  # as of the features
                right_UB = _right(scale * terms[name] / length_B[:, None], among)
                counted_B = among.both_B & present(batch, self.parts[name]).all(dim=1)
                found[name] += torch.cat([(right_UB * counted_B).double().sum(dim=1), counted_B.sum()[None]])
        return found

    @property
    def _queue(self) -> Features:
        return Features(self.queue_rows, self.queue_present, self.queue_group_ids)

    def after_step(self, committed: bool) -> None:
        """The step's features become the newest of the queue."""
        super().after_step(committed)
        stored, self._stored = self._stored, []
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


def _right(queries_UBP: Tensor, among: Candidates) -> Tensor:
    """[U, B]: the probability of a query's own other side by the softmax over its candidates."""
    logits_UBN = queries_UBP @ among.keys_NP.t()
    usable_BN = among.usable_BN | among.is_own_BN  # a query without candidates does not count, but must be finite
    probability_UBN = logits_UBN.masked_fill(~usable_BN, -math.inf).softmax(dim=-1)
    return (probability_UBN * among.is_own_BN).sum(dim=-1)


def _candidates(everyone: Features, keys: Features, query: int, key: int, mine: slice) -> Candidates:
    both_G = everyone.present_BR[:, query] & everyone.present_BR[:, key]
    places_N = torch.arange(len(keys.group_ids_B), device=both_G.device)
    own_B, both_B = places_N[mine], both_G[mine]
    is_own_BN = places_N == own_B[:, None]
    same_BN = everyone.group_ids_B[mine, None] == keys.group_ids_B
    usable_BN = keys.present_BR[:, key] & (~same_BN | is_own_BN) & both_B[:, None]
    return Candidates(everyone.rows_BRP[mine, query], keys.rows_BRP[:, key], own_B, is_own_BN, usable_BN, both_B)
