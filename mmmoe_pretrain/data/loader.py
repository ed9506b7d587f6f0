"""Training microbatches by number, so that any layout, worker count and restart reads the same.

The global order is divided into microbatches here. Rank r of dp ranks takes of microbatch a of
batch b the global positions ``[(b * A + a) * dp * B + r * B, + B)``, with A microbatches a batch and
B samples each; the cursor says which batch a step trains on.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from mmmoe_pretrain.batch import Batch, Sample, SampleMeta, map_leaves
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.data.decode import BadSample, Draws, decode
from mmmoe_pretrain.data.order import MixOrder
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.data.shards import OpenShards, ShardFolder
from mmmoe_pretrain.data.workers import ReadAhead, Workers
from mmmoe_pretrain.modalities import Modalities

SHARE_OF_HANG = 0.8  # a rank that waits for data makes no progress: workers are replaced before it counts as hanging


@dataclass(frozen=True)
class LoadStats:
    """What reading some samples took. ``wait_seconds``: how long the training loop stood still."""

    samples: int = 0
    bad: tuple[BadSample, ...] = ()
    cut: Counter[str] = field(default_factory=Counter)  # values that were too long, by modality
    wait_seconds: float = 0.0
    worker_restarts: int = 0  # of workers that died or hung

    def __add__(self, other: LoadStats) -> LoadStats:
        return LoadStats(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


class StepData(NamedTuple):
    """What one rank reads for a step: the microbatches of global batch ``batch``."""

    step: int
    batch: int
    microbatches: list[Batch]
    stats: LoadStats

    @property
    def keys(self) -> list[str]:
        """Of all samples, in the order of their positions; bad ones included."""
        return [meta.key for microbatch in self.microbatches for meta in microbatch.metas]


class MicrobatchDataset:
    """Item n is microbatch ``n = batch * num_microbatches + a`` of one data-parallel rank."""

    def __init__(self, config: RunConfig, modalities: Modalities, *, dp_rank: int = 0, dp_size: int = 1) -> None:
        self.batch_size = microbatch_size(config, dp_size)
        self._most = document_tokens(config, modalities)
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._seed = config.seed
        self._modalities, self._prompt = modalities, config.evaluate.prompt
        self._settings = PackSettings.from_config(config, modalities)
        files = OpenShards()
        self.folders = [ShardFolder(source.path, files, modalities) for source in config.data.train]
        self._order = MixOrder(
            [len(folder) for folder in self.folders], [source.weight for source in config.data.train], config.seed
        )

    def __getitem__(self, number: int) -> tuple[Batch, LoadStats]:
        positions = self.positions(number)
        raws = (folder.read(index) for folder, index in self._places(positions))
        cut_before = Counter(self._modalities.cut)
        decoded = [
            decode(raw, self._modalities, Draws(self._seed, position), self._prompt, self._most)
            for raw, position in zip(raws, positions.tolist(), strict=True)
        ]
        bad = tuple(item for item in decoded if isinstance(item, BadSample))
        stats = LoadStats(len(decoded), bad, Counter(self._modalities.cut) - cut_before)
        return pack([keep_slot(item) for item in decoded], self._settings, positions), stats

    def positions(self, number: int) -> np.ndarray:
        """Global positions of microbatch ``number``, int64 [batch_size]."""
        start = (number * self._dp_size + self._dp_rank) * self.batch_size
        return np.arange(start, start + self.batch_size)

    def keys(self, number: int) -> list[str]:
        """The keys of microbatch ``number``, without reading it."""
        return [folder.key(index) for folder, index in self._places(self.positions(number))]

    def _places(self, positions: np.ndarray) -> list[tuple[ShardFolder, int]]:
        draws = self._order.at(positions)
        pairs = zip(draws.source.tolist(), draws.index.tolist(), strict=True)
        return [(self.folders[source], index) for source, index in pairs]


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


def document_tokens(config: RunConfig, modalities: Modalities) -> int | None:
    """The most that a document keeps. Raises ValueError where one item may take more."""
    most = config.data.max_tokens_per_document
    longest, name = max((modality.max_tokens, name) for name, modality in modalities.items())
    if most is not None and most < longest:
        raise ValueError(
            f"data.max_tokens_per_document {most} leaves no room for the {longest} tokens that one {name} may have; "
            f"raise it to {longest}, or lower the limits of modalities.{name}"
        )
    return most


def keep_slot(item: Sample | BadSample) -> Sample:
    """The sample, or an empty one in the place of a bad one."""
    return item if isinstance(item, Sample) else Sample(SampleMeta(item.key))


class Loader:
    """Iterates over the ``StepData`` of the steps from ``start_step`` up to ``stop_step`` (train.steps unless given),
    whose batches ``cursor`` chooses (by default all, in order).

    It has no state to save: a step and a cursor make an equal one, so the first step of a resumed run equals the same
    step of an uninterrupted one. The worker processes start with the first step, and end with the last one, with
    ``close`` (also by ``with``), and with this process.
    """

    def __init__(
        self,
        config: RunConfig,
        modalities: Modalities,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_step: int = 0,
        stop_step: int | None = None,
        cursor: Cursor | None = None,
    ) -> None:
        dataset = MicrobatchDataset(config, modalities, dp_rank=dp_rank, dp_size=dp_size)
        self._dataset, self._count = dataset, config.train.num_microbatches
        self._step, self._stop = start_step, config.train.steps if stop_step is None else stop_step
        self._cursor = cursor or Cursor()
        self._items: list[tuple[Batch, LoadStats]] = []  # of the next step
        workers = Workers(
            config.data.num_workers,
            config.data.prefetch,
            config.data.worker_timeout or config.hang_seconds,  # ``patience`` has less
            config.faults.max_worker_restarts,
            together=self._count,
            patience=SHARE_OF_HANG * config.hang_seconds,
        )
        self._reader = ReadAhead(_Microbatches(dataset, self._cursor, self._count), self._numbers(), workers)

    @property
    def folders(self) -> list[ShardFolder]:
        """Of the sources of data.train."""
        return self._dataset.folders

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepData:
        began, restarts = time.perf_counter(), self._reader.restarts
        while len(self._items) < self._count:  # kept, should a signal's handler raise in between
            self._items.append(_to_tensors(next(self._reader)))
        items, self._items = self._items, []
        stats = dataclasses.replace(
            sum((stats for _, stats in items), LoadStats()),
            wait_seconds=time.perf_counter() - began,
            worker_restarts=self._reader.restarts - restarts,
        )
        step = self._step
        self._step += 1
        return StepData(step, self._cursor.batch(step), [batch for batch, _ in items], stats)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def seek(self, step: int, cursor: Cursor) -> None:
        """Continue at ``step`` with ``cursor``, e.g. after a rollback: what was read ahead is dropped."""
        self._step, self._cursor, self._items = step, cursor, []
        self._reader.seek(_Microbatches(self._dataset, cursor, self._count), self._numbers())

    def close(self) -> None:
        """End the worker processes at once; nothing comes after it."""
        self._reader.close()

    @property
    def worker_pids(self) -> list[int]:
        """The worker processes that run now."""
        return self._reader.pids

    def _numbers(self) -> range:
        return range(self._step * self._count, self._stop * self._count)


@dataclass(frozen=True)
class _Microbatches:
    """The microbatches of all steps one after the other: number k is the ``k % count``-th of step ``k // count``."""

    dataset: MicrobatchDataset
    cursor: Cursor
    count: int

    def read(self, k: int) -> Any:
        return _to_arrays(self.dataset[self._number(k)])

    def describe(self, k: int) -> str:
        number = self._number(k)
        return f"batch {number // self.count}, samples {', '.join(self.dataset.keys(number))[:400]}"

    def _number(self, k: int) -> int:
        step, part = divmod(k, self.count)
        return self.cursor.batch(step) * self.count + part


def _to_arrays(item: object) -> object:
    """Tensors as arrays, which cross a pipe faster."""
    return map_leaves(item, torch.Tensor, torch.Tensor.numpy)


def _to_tensors(item: Any) -> Any:
    return map_leaves(item, np.ndarray, torch.from_numpy)
