"""Held-out losses and scores in training: ``evaluate.every``.

The validation samples are cut into steps and microbatches as those of training are, without augmentation and in one
order, so the losses are those of training on other samples, and equal at any layout. A rank takes every R-th sample
of a microbatch, R being the data-parallel size. Every rank of a replica decodes them by itself, once: it keeps them.
Scores are those of ``mmmoe evaluate``, on the features of all ranks. Linear CCA, of runs that it scores, is fitted on
training samples, which pass through the model after the validation samples.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmmoe_pretrain.batch import Batch, Sample, SampleMeta, map_leaves
from mmmoe_pretrain.config import HELD_OUT, RunConfig
from mmmoe_pretrain.data.decode import decode, keep_slot, without_withheld
from mmmoe_pretrain.data.evaluation import eval_settings, shares_of_mix, spread
from mmmoe_pretrain.data.loader import Loader
from mmmoe_pretrain.data.order.assign import microbatch_size
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.data.sources.listing import is_stream, list_shards
from mmmoe_pretrain.data.sources.members import RawSample
from mmmoe_pretrain.data.sources.overlap import overlap
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data.storage.files import Files, read_settings
from mmmoe_pretrain.data.workers.replica import ReplicaLoader
from mmmoe_pretrain.engines.base import Engine
from mmmoe_pretrain.evaluate import correlated, scores
from mmmoe_pretrain.evaluate.features import Contents, HeldOut, contents, held_out, joined, taken, vocabularies_of
from mmmoe_pretrain.evaluate.scores import Pair
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.objectives import Objectives, Outputs
from mmmoe_pretrain.parallel.agreement import agree, exchange, from_rank_0
from mmmoe_pretrain.parallel.groups import Groups, HostGroups
from mmmoe_pretrain.train.watchdog import Watchdog

MOST_KEPT = 512 << 20  # bytes of decoded samples that a rank keeps from one evaluation to the next
Part = tuple[np.ndarray, HeldOut]  # numbers of samples, and what is known of them


@dataclass(frozen=True)
class _Microbatch:
    """Of one rank. ``numbers`` of its samples, which may lie past the last one."""

    numbers: np.ndarray
    contents: Contents
    batch: Batch

    @property
    def nbytes(self) -> int:
        sizes: list[int] = []
        map_leaves(self.batch, Tensor, lambda tensor: sizes.append(tensor.nbytes))
        return sum(sizes)


@dataclass(frozen=True)
class HeldOutScores:
    """``losses`` by name, as those of a step. ``scores``: recall, the higher the better, and perplexity."""

    losses: dict[str, float]
    scores: dict[str, float]
    samples: int
    seconds: float

    def by_name(self) -> dict[str, float]:
        return {**self.losses, **self.scores}

    def metric(self, name: str) -> float:
        """The lower, the better."""
        value = self.by_name()[name]
        return -value if higher_is_better(name) else value


def higher_is_better(name: str) -> bool:
    """Of a loss or score: recall, accuracy and the area under a ROC curve."""
    return name.endswith((*(f"_r{k}" for k in scores.KS), "_accuracy", "_accuracy_balanced", "_auroc"))


def open_validation(
    config: RunConfig,
    modalities: Modalities,
    groups: Groups,
    host: HostGroups,
    loader: Loader | ReplicaLoader,
    losses: Sequence[str],
) -> Validation | None:
    """None where the config scores nothing in training. ``losses``: those of the model. Raises ValueError on every
    rank where the shards cannot be read, or have samples that are trained on, and where checkpoint.best_metric is
    none of the losses and scores. Collective."""
    if not config.evaluate.every:
        return None
    found = Validation(config, modalities, groups, host)
    from_rank_0(host.storage, lambda: found.refuse_overlap(loader.sources))
    wanted = config.checkpoint.best_metric
    known = ["total", *losses]
    if config.checkpoint.keep_best and wanted.startswith(HELD_OUT) and wanted.removeprefix(HELD_OUT) not in known:
        known += found.score_names()
        if wanted.removeprefix(HELD_OUT) not in known:
            raise ValueError(
                f"checkpoint.best_metric {wanted} is none of the held-out losses and scores of evaluate.validation: "
                f"{', '.join(HELD_OUT + name for name in known)}"
            )
    return found


@dataclass(frozen=True)
class _Chosen:
    """Samples of ``sources``, each by the number of its source and its number there."""

    sources: list[Indexed]
    places: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.places)

    def read(self, number: int) -> RawSample:
        source, index = self.places[number]
        return self.sources[source].read(index)


class Validation:
    """The validation samples of a run, and their scores. Every rank makes one and calls the same methods."""

    def __init__(self, config: RunConfig, modalities: Modalities, groups: Groups, host: HostGroups) -> None:
        self.config, self._modalities, self._groups, self._host = config, modalities, groups, host
        self._settings, self._files = eval_settings(config, modalities), Files(read_settings(config))
        self._objectives = self._settings.objectives
        self._kept: dict[int, _Microbatch] = {}  # by the number of their first sample
        self._kept_bytes = 0
        sources = self._open(config.evaluate.validation)
        ends = np.cumsum([len(source) for source in sources])
        self.samples = min(int(ends[-1]), config.evaluate.samples)
        spread_evenly = (np.arange(self.samples) * int(ends[-1]) // self.samples).tolist()
        self._held_out = _Chosen(sources, [_place(number, ends) for number in spread_evenly])
        size = config.train.global_batch_size
        self._first_fit = math.ceil(self.samples / size) * size  # the number of the first training sample
        self._fit = self._training_samples()
        self._projected = correlated.sides_of_all(self._correlated)

    @property
    def _correlated(self) -> tuple[Pair, ...]:
        """The pairs that are scored after linear CCA."""
        return self._objectives.correlated if len(self._fit) else ()

    def _open(self, paths: Sequence[str]) -> list[Indexed]:
        """Collective."""
        listings = from_rank_0(self._host.storage, lambda: [list_shards(path, self._files) for path in paths])
        return agree(
            self._host.storage,
            lambda: [open_indexed(its.spec, self._files, self._modalities, listing=its) for its in listings],
        )

    def _training_samples(self) -> _Chosen:
        """Those that linear CCA is fitted on, as in ``evaluation.training_samples``; none where nothing is scored
        after it, and of streams, which are not read by number. Collective."""
        config = self.config
        if not self._objectives.correlated or any(is_stream(source.path) for source in config.data.train):
            return _Chosen([], [])
        sources = self._open([source.path for source in config.data.train])
        wanted = correlated.fit_samples(config.model.embedding_size)
        shares = zip(sources, shares_of_mix(config), strict=True)
        return _Chosen(
            sources,
            [(s, i) for s, (source, share) in enumerate(shares) for i in spread(len(source), wanted * share)],
        )

    def refuse_overlap(self, train: Sequence[object]) -> None:
        """Raises ValueError where one of the samples is in ``train`` too, byte by byte; for rank 0."""
        indexed = [source for source in train if isinstance(source, Indexed)]
        found = overlap([(self._held_out.sources[s], i) for s, i in self._held_out.places], indexed)
        if found is not None:
            raise ValueError(
                f"evaluate.validation has {found.count} of {found.compared} samples that are trained on, too: "
                f"{found.first} is {found.second}; remove them (mmmoe-data dedup --against), or name other "
                f"shards"
            )

    def score(self, engine: Engine, watchdog: Watchdog, step: int, stop: Callable[[], bool]) -> HeldOutScores | None:
        """The losses and scores of the model after ``step`` steps, equal on every rank; None where ``stop()``, which
        is collective and asked before each step of samples, ends it. Collective."""
        began = time.perf_counter()
        parts: list[Part] = []
        sums: defaultdict[str, float] = defaultdict(float)
        counts = Counter[str]()
        size = self.config.train.global_batch_size
        for start in range(0, self.samples, size):
            watchdog.beat(step, "evaluate")
            if stop():
                return None
            losses, terms = self._step(engine, start, parts)
            for name, value in losses.items():  # of auxiliary losses, whose terms are tokens, and of objectives
                weight = terms.get(name, terms["tokens"])
                sums[name] += weight * value
                counts[name] += weight
        fit: list[Part] = []
        for start in range(self._first_fit, self._first_fit + len(self._fit), size):
            watchdog.beat(step, "evaluate")
            if stop():
                return None
            self._step(engine, start, fit)
        watchdog.beat(step, "evaluate")
        means = {name: sums[name] / counts[name] if counts[name] else 0.0 for name in sums}
        means["total"] = sum(value for name, value in means.items() if name != "total")
        # Not over ``storage``, which the thread of a save in flight may use.
        found = exchange(
            self._host.control,
            lambda: (_only(parts), _only(fit)),
            lambda ranks: self._scores(*([*filter(None, its)] for its in zip(*ranks, strict=True))),
        )
        return HeldOutScores(means, found, self.samples, time.perf_counter() - began)

    def _step(self, engine: Engine, start: int, parts: list[Part]) -> tuple[dict[str, float], Counter[str]]:
        """The losses of one step from sample ``start`` on, and their terms; adds this rank's ``parts``."""
        made = list(self._microbatches(start))
        waiting = iter(made)
        shown = self._groups.tensor_rank == 0  # the others have the same outputs
        sizes, projected = vocabularies_of(self.config), self._projected

        def observe(outputs: Outputs) -> None:
            its = next(waiting)
            if shown:
                made = held_out(outputs, its.batch, its.contents, sizes, projected=projected)
                parts.append((its.numbers, made))

        losses, counts = engine.evaluate([its.batch for its in made], observe)
        return losses, Counter({**counts.terms, "tokens": counts.tokens})

    def score_names(self) -> list[str]:
        """The names of all scores, which depend on the samples alone. Collective."""
        return exchange(
            self._host.storage, self._without_model, lambda ranks: [*self._scores([*filter(None, ranks)])]
        )

    def _without_model(self) -> Part | None:
        """This rank's samples with features of zeros; None where another rank has the same samples."""
        if self._groups.tensor_rank or self._groups.pipeline_rank:
            return None
        starts = range(0, self.samples, self.config.train.global_batch_size)
        made = itertools.chain.from_iterable(map(self._microbatches, starts))
        sizes = vocabularies_of(self.config)
        return _only(
            [(its.numbers, held_out(_zeros(its, self._objectives), its.batch, its.contents, sizes)) for its in made]
        )

    def _microbatches(self, start: int) -> Iterator[_Microbatch]:
        """Those of a step, of this rank; the first ones that were made are kept."""
        each, ranks = microbatch_size(self.config, self._groups.data_size), self._groups.data_size
        for number in range(self.config.train.num_microbatches):
            first = start + number * each * ranks + self._groups.data_rank
            made = self._kept.get(first) or self._make(np.arange(first, first + each * ranks, ranks))
            if first not in self._kept and self._kept_bytes + made.nbytes <= MOST_KEPT:
                self._kept[first] = made
                self._kept_bytes += made.nbytes
            yield made

    def _make(self, numbers: np.ndarray) -> _Microbatch:
        samples = [self._sample(n) for n in numbers.tolist()]
        batch = pack(samples, self._settings, numbers)
        return _Microbatch(numbers, contents(batch, samples, self._objectives), batch)

    def _sample(self, number: int) -> Sample:
        """Empty where it cannot be decoded, and past the last one."""
        chosen = self._held_out
        if number >= self._first_fit:
            chosen, number = self._fit, number - self._first_fit
        if number >= len(chosen):
            return Sample(SampleMeta(""))
        most = self.config.data.max_tokens_per_document
        sample = keep_slot(decode(chosen.read(number), self._modalities, most=most))
        return without_withheld(sample, self._modalities) if chosen is self._fit else sample

    def _scores(self, ranks: Sequence[Part], fit: Sequence[Part] = ()) -> dict[str, float]:
        """Of the parts of all ranks. Recall is NaN where a feature is not finite: no checkpoint is the best by it."""
        data = _in_order(ranks, self.samples)
        names, settings = self.config.stream_names.modalities, self.config.evaluate
        found: dict[str, float] = {}
        for pair in self._objectives.scored(settings.pairs):
            known = all(np.isfinite(data.features[name]).all() for name in pair)
            for score in scores.retrieval_scores(data, pair, settings)[0]:
                found[score.metric] = score.value if known else math.nan
        for pair in self._correlated:
            found |= self._after_cca(data, _in_order(fit, len(self._fit)) if fit else None, pair)
        for task, predicted in data.predicted.items():
            its = scores.perplexity_scores(task, predicted, None, names, settings)
            found |= {score.metric: score.value for score in its}
        for task, objective in self._objectives.classifying.items():
            known = np.isfinite(data.class_logits[task]).all()
            for score in scores.class_scores(data, task, objective.representations[0], objective.settings)[0]:
                found[score.metric] = score.value if known else math.nan
        return {metric: value for metric, value in found.items() if "/" not in metric}

    def _after_cca(self, data: HeldOut, train: HeldOut | None, pair: Pair) -> dict[str, float]:
        """Retrieval after linear CCA of ``train``; NaN without it, where it is too little and where a vector is not
        finite."""
        settings = self.config.evaluate
        found = {score.metric: math.nan for score in scores.retrieval_scores(data, pair, settings)[0]}
        if train is None or not all(np.isfinite(its.projected[name]).all() for its in (data, train) for name in pair):
            return found
        made, _ = correlated.retrieval_scores(data, train, pair, settings, alone=True)
        return found | {score.metric: score.value for score in made}


def _place(number: int, ends: np.ndarray) -> tuple[int, int]:
    """The source of sample ``number`` of all, and its number there. ``ends``: of the sources."""
    source = int(np.searchsorted(ends, number, side="right"))
    return source, number - int(ends[source - 1] if source else 0)


def _in_order(ranks: Sequence[Part], count: int) -> HeldOut:
    """The first ``count`` samples by number, of all ranks."""
    numbers = np.concatenate([numbers for numbers, _ in ranks])
    return taken(joined([part for _, part in ranks]), np.argsort(numbers)[:count])


def _zeros(its: _Microbatch, objectives: Objectives) -> Outputs:
    """Outputs of no model, of which scores have their names."""
    features = {name: torch.zeros(len(its.numbers), 1) for name in objectives.representations}
    token_nll = {task: torch.zeros(len(its.batch.targets[task].ids)) for task in objectives.predicting}
    contents = {loss: torch.zeros_like(its.batch.contents[loss].values) for loss in objectives.contents}
    logits = {
        task: torch.zeros(len(its.numbers), len(objective.classes))
        for task, objective in objectives.classifying.items()
    }
    return Outputs(torch.zeros(0), features, token_nll, contents, features, class_logits=logits)


def _only(parts: list[Part]) -> Part | None:
    """All parts of a rank as one; None where it has none."""
    if not parts:
        return None
    return np.concatenate([numbers for numbers, _ in parts]), joined([part for _, part in parts])
