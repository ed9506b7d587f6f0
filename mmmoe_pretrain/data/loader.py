"""Training microbatches by number, so that any layout, worker count and restart reads the same.

Owns the cut of the global order into microbatches, the worker processes, and the budget of bad
samples. Rank r of dp ranks takes of microbatch a of step s the global positions
``[(s * A + a) * dp * B + r * B, + B)``, with A microbatches a step and B samples each.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmmoe_pretrain.batch import Batch, Sample, SampleMeta
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.decode import Augment, BadSample, decode
from mmmoe_pretrain.data.order import MixOrder
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.data.shards import ShardFolder
from mmmoe_pretrain.modalities import Codecs

logger = logging.getLogger(__name__)
MIN_READ = 100  # samples, before the share of bad ones counts
KEYS_NAMED = 5


@dataclass(frozen=True)
class LoadStats:
    """What reading some samples took. ``wait_seconds``: how long the training loop stood still."""

    samples: int = 0
    bad: tuple[BadSample, ...] = ()
    cut_audio: int = 0  # clips longer than max_seconds
    cut_text: int = 0  # texts longer than max_tokens
    work_seconds: float = 0.0
    wait_seconds: float = 0.0

    def __add__(self, other: LoadStats) -> LoadStats:
        return LoadStats(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


Loader = Iterator[tuple[int, list[Batch], LoadStats]]  # step, its microbatches, their statistics


@dataclass
class BadBudget:
    """Ends the run once more than ``limit`` of the samples read so far were bad."""

    limit: float
    read: int = 0
    bad: list[BadSample] = field(default_factory=list)

    def spend(self, stats: LoadStats) -> None:
        """Count ``stats`` and log its bad samples. Raises ValueError past the limit."""
        self.read += stats.samples
        self.bad += stats.bad
        for sample in stats.bad:
            logger.warning("skipped sample %s: %s", sample.key, sample.reason)
        if self.read >= MIN_READ and len(self.bad) > self.limit * self.read:
            first = "; ".join(f"{sample.key}: {sample.reason}" for sample in self.bad[:KEYS_NAMED])
            raise ValueError(
                f"{len(self.bad)} of {self.read} samples read were bad, more than "
                f"data.max_bad_fraction {self.limit} allows. The first: {first}. Repair or "
                f"leave out these files and shard again (mmmoe-data shard), or raise data.max_bad_fraction"
            )


class MicrobatchDataset(Dataset[tuple[Batch, LoadStats]]):
    """Item n is microbatch ``n = step * num_microbatches + a`` of one data-parallel rank."""

    def __init__(
        self,
        config: RunConfig,
        codecs: Codecs,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        tokens: int | None = None,
    ) -> None:
        self.batch_size = microbatch_size(config, dp_size)
        self.tokens = tokens
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._seed = config.seed
        self._codecs = codecs
        self._augment = Augment.from_config(config)
        self._settings = PackSettings.from_config(config, codecs)
        self._folders = [ShardFolder(source.path) for source in config.data.train]
        self._order = MixOrder(
            [len(folder) for folder in self._folders],
            [source.weight for source in config.data.train],
            config.seed,
        )

    def __getitem__(self, number: int) -> tuple[Batch, LoadStats]:
        start = (number * self._dp_size + self._dp_rank) * self.batch_size
        positions = np.arange(start, start + self.batch_size)
        draws = self._order.at(positions)
        raws = (
            self._folders[source].read(index)
            for source, index in zip(draws.source.tolist(), draws.index.tolist(), strict=True)
        )
        with _Counted(self._codecs) as counted:
            decoded = [
                decode(raw, self._codecs, self._augment, seed=self._seed, position=position)
                for raw, position in zip(raws, positions.tolist(), strict=True)
            ]
            batch = pack([keep_slot(item) for item in decoded], self._settings, positions, self.tokens)
        return batch, counted.stats(decoded)


def microbatch_size(config: RunConfig, dp_size: int) -> int:
    """Samples of a microbatch on one rank. Raises ValueError where the global batch does not divide."""
    total, parts = config.train.global_batch_size, config.train.num_microbatches * dp_size
    if total % parts:
        near = max(1, round(total / parts)) * parts
        raise ValueError(
            f"train.global_batch_size {total} does not divide into train.num_microbatches "
            f"{config.train.num_microbatches} x {dp_size} data-parallel ranks; use e.g. {near}"
        )
    return total // parts


def keep_slot(item: Sample | BadSample) -> Sample:
    """The sample, or an empty one in the place of a bad one."""
    return item if isinstance(item, Sample) else Sample(SampleMeta(item.key))


class _Counted:
    """Measures the time and the codecs' cuts of the work inside a ``with``."""

    def __init__(self, codecs: Codecs) -> None:
        self._codecs = codecs

    def __enter__(self) -> _Counted:
        self._before = (time.perf_counter(), self._codecs.audio.cut, self._codecs.text.cut)
        return self

    def __exit__(self, *_: object) -> None:
        after = (time.perf_counter(), self._codecs.audio.cut, self._codecs.text.cut)
        self._spent = [b - a for a, b in zip(self._before, after, strict=True)]

    def stats(self, decoded: list[Sample | BadSample]) -> LoadStats:
        seconds, cut_audio, cut_text = self._spent
        return LoadStats(
            len(decoded),
            tuple(item for item in decoded if isinstance(item, BadSample)),
            int(cut_audio),
            int(cut_text),
            seconds,
        )


def make_loader(
    config: RunConfig,
    codecs: Codecs,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
    start_step: int = 0,
    stop_step: int | None = None,
    tokens: int | None = None,
) -> Loader:
    """Yield (step, its microbatches, their statistics) from ``start_step`` up to ``stop_step``.

    The default stop is train.steps. The first step of a resumed run equals the same step of an
    uninterrupted one by construction.
    """
    dataset = MicrobatchDataset(config, codecs, dp_rank=dp_rank, dp_size=dp_size, tokens=tokens)
    stop = config.train.steps if stop_step is None else stop_step
    return _steps(dataset, config, start_step, stop)


def _steps(
    dataset: MicrobatchDataset, config: RunConfig, start: int, stop: int
) -> Iterator[tuple[int, list[Batch], LoadStats]]:
    count = config.train.num_microbatches
    budget = BadBudget(config.data.max_bad_fraction)
    microbatches = _read_ahead(dataset, config, range(start * count, stop * count))
    for step in range(start, stop):
        began = time.perf_counter()
        items = [next(microbatches) for _ in range(count)]
        stats = sum((stats for _, stats in items), LoadStats())
        budget.spend(stats)
        stats = dataclasses.replace(stats, wait_seconds=time.perf_counter() - began)
        yield step, [batch for batch, _ in items], stats


def _read_ahead(dataset: MicrobatchDataset, config: RunConfig, numbers: range) -> Iterator[tuple[Batch, LoadStats]]:
    workers = config.data.num_workers
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_to_arrays if workers else _as_is,
        prefetch_factor=config.data.prefetch if workers else None,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # else every iterator would draw a seed from the model's generator
    )
    try:
        for item in loader:
            yield _to_tensors(item)
    except RuntimeError as error:
        if "DataLoader worker" in str(error) and ("killed" in str(error) or "exited" in str(error)):
            raise RuntimeError(
                f"a data worker died ({error}); out of memory is the usual cause: lower "
                f"data.num_workers or data.prefetch, then resume"
            ) from error
        raise


def _as_is(item: object) -> object:
    return item


def _to_arrays(item: object) -> object:
    """Tensors as arrays: they cross the pipe by value, where tensors would each take a descriptor
    and room in /dev/shm, which containers keep small."""
    return _map_leaves(item, torch.Tensor, torch.Tensor.numpy)


def _to_tensors(item: Any) -> Any:
    return _map_leaves(item, np.ndarray, torch.from_numpy)


def _map_leaves(value: Any, kind: type, function: Any) -> Any:
    if isinstance(value, kind):
        return function(value)
    if type(value) is tuple:
        return tuple(_map_leaves(item, kind, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value,
            **{f.name: _map_leaves(getattr(value, f.name), kind, function) for f in dataclasses.fields(value)},
        )
    return value
