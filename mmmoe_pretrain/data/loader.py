"""Training microbatches by number, so that any layout, worker count and restart reads the same.

``assign.py`` says which samples a rank reads of which microbatch; the cursor says which batch a step trains on.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import xxhash

from mmmoe_pretrain.batch import Batch, Sample, to_arrays, to_pinned, to_tensors
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.data.decode import BadSample, Draws, decode, document_tokens, keep_slot
from mmmoe_pretrain.data.order.assign import Assignment, Share
from mmmoe_pretrain.data.order.positions import Places
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.data.shared import Found, open_sources
from mmmoe_pretrain.data.sources import stream_state
from mmmoe_pretrain.data.sources.listing import without_ranges
from mmmoe_pretrain.data.sources.members import RawSample
from mmmoe_pretrain.data.sources.source import Indexed
from mmmoe_pretrain.data.sources.stream import LaneState, Stream
from mmmoe_pretrain.data.storage.files import Files, read_settings
from mmmoe_pretrain.data.workers.read_ahead import ReadAhead, Workers, more_than_cores
from mmmoe_pretrain.data.workers.server import WorkerServer
from mmmoe_pretrain.data.workers.worker import Process, run_worker
from mmmoe_pretrain.modalities import Modalities, build_modalities

SHARE_OF_HANG = 0.8  # a rank that waits for data makes no progress: workers are replaced before it counts as hanging

LaneOf = tuple[int, int, LaneState]  # source, sub-lane and state of the window, of a sample of a stream


@dataclass(frozen=True)
class LoadStats:
    """What reading some samples took. ``wait_seconds``: how long the training loop stood still. ``seconds``: of
    all workers together, by stage: read, decode, transform (resize and crop, log-mel), pack, transfer (through shared
    memory and to other ranks)."""

    samples: int = 0
    bad: tuple[BadSample, ...] = ()
    cut: Counter[str] = field(default_factory=Counter)  # values that were too long, by modality
    wait_seconds: float = 0.0
    worker_restarts: int = 0  # of workers that died or hung
    lanes: tuple[LaneOf, ...] = ()  # of each sample of a stream
    seconds: Counter[str] = field(default_factory=Counter)

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


class Made(NamedTuple):
    """A sample on its way from the worker that decoded it to the one that packs it."""

    item: Sample | BadSample
    cut: Counter[str]
    read_seconds: float
    decode_seconds: float
    transform_seconds: float
    lane: LaneOf | None


class MicrobatchDataset:
    """Item n is microbatch ``n = batch * num_microbatches + a`` of one data-parallel rank."""

    def __init__(
        self,
        config: RunConfig,
        modalities: Modalities,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        found: Found | None = None,
    ) -> None:
        self._most = document_tokens(config, modalities)
        self._dp_rank = dp_rank
        self._seed, self._batch = config.seed, config.train.global_batch_size
        self._modalities, self._prompt = modalities, config.evaluate.prompt
        self.settings = PackSettings.from_config(config, modalities)
        self._files = Files(read_settings(config))
        self.sources = open_sources(config, modalities, self._files, found, "local" if found is None else "none")
        self.assignment = Assignment(config, self.sources, modalities, dp_size, found.estimates if found else None)
        streams = ((part.source, self.sources[part.source], part.sizes) for part in self.assignment.blend.parts)
        self.streams = {
            source: (stream, int(lanes)) for source, stream, lanes in streams if isinstance(stream, Stream)
        }

    def notes(self) -> list[str]:
        """What a user should know about the blend and the servers, which are asked."""
        urls = (url for source in self.sources if isinstance(source, Indexed) for url in source.urls)
        return [*self.assignment.blend.notes, *without_ranges(urls, self._files)]

    def positions(self, number: int) -> np.ndarray:
        """Global positions of microbatch ``number``, int64 [n]."""
        return self._share(number).positions

    def samples(self, number: int, which: Sequence[int]) -> Iterator[Made]:
        """Samples ``which`` of microbatch ``number``, read and decoded one after the other."""
        share = self._share(number)
        for i in which:
            began, cut_before = time.perf_counter(), Counter(self._modalities.cut)
            before = self._modalities.transform_seconds
            raw, lane = self._read(share.places, i)
            read = time.perf_counter()
            position = int(share.positions[i])
            draws = Draws(self._seed, position, position // self._batch)
            item = decode(raw, self._modalities, draws, self._prompt, self._most)
            cut = Counter(self._modalities.cut) - cut_before
            transform = self._modalities.transform_seconds - before
            yield Made(item, cut, read - began, time.perf_counter() - read - transform, transform, lane)

    def pack(self, number: int, made: Sequence[Made], step: int | None = None) -> tuple[Batch, LoadStats]:
        """Microbatch ``number``, of all its samples in order. ``step``: that trains on it (``pack.pack``)."""
        began, samples = time.perf_counter(), [keep_slot(sample.item) for sample in made]
        batch = pack(samples, self.settings, self.positions(number), step=step)
        seconds = {
            "read": sum(sample.read_seconds for sample in made),
            "decode": sum(sample.decode_seconds for sample in made),
            "transform": sum(sample.transform_seconds for sample in made),
            "pack": time.perf_counter() - began,
        }
        bad = tuple(sample.item for sample in made if isinstance(sample.item, BadSample))
        cut = sum((sample.cut for sample in made), Counter[str]())
        lanes = tuple(sample.lane for sample in made if sample.lane is not None)
        return batch, LoadStats(len(made), bad, cut, lanes=lanes, seconds=Counter(seconds))

    def key(self, number: int, sample: int) -> str:
        """The key of a sample of microbatch ``number``, without reading it; of a stream, its place."""
        places = self._share(number).places
        source = self.sources[int(places.source[sample])]
        if isinstance(source, Indexed):
            return source.key(int(places.index[sample]))
        return f"{places.number[sample]} of sub-lane {places.sub_lane[sample]} of source {places.source[sample]}"

    def pins(self, number: int) -> list[int | None]:
        """Of each sample: all of one sub-lane of a stream are read in order by one worker."""
        if not self.streams:
            return [None] * self.assignment.batch_size
        places = self._share(number).places
        lanes = zip(places.source.tolist(), places.sub_lane.tolist(), strict=True)
        return [lane + source if source in self.streams else None for source, lane in lanes]

    def _share(self, number: int) -> Share:
        return self.assignment.of_rank(number, self._dp_rank)

    def _read(self, places: Places, i: int) -> tuple[RawSample, LaneOf | None]:
        number = int(places.source[i])
        source = self.sources[number]
        if isinstance(source, Indexed):
            return source.read(int(places.index[i])), None
        lane = int(places.sub_lane[i])
        raw, state = source.read(lane, int(places.number[i]))
        return raw, (number, lane, state)


class Loader:
    """Iterates over the ``StepData`` of the steps from ``start_step`` up to ``stop_step`` (train.steps unless given),
    whose batches ``cursor`` chooses (by default all, in order).

    Of indexed sources it has no state to save: a step and a cursor make an equal one, so the first step of a resumed
    run equals the same step of an uninterrupted one. Of streams it has ``stream_states``. The worker
    processes start with the first step, and end with the last one, with ``close`` (also by ``with``), and with this
    process.
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
        found: Found | None = None,
        pinned: bool = False,
        server: WorkerServer | None = None,
    ) -> None:
        """``pinned``: batches are in memory that a GPU copies from by itself. ``server``: it forks the workers."""
        dataset = MicrobatchDataset(config, modalities, dp_rank=dp_rank, dp_size=dp_size, found=found)
        self._dataset, self._count = dataset, config.train.num_microbatches
        self._train, self._dp_size, self._num_workers = config.train, dp_size, config.data.num_workers
        self._step, self._stop = start_step, config.train.steps if stop_step is None else stop_step
        self._cursor = cursor or Cursor()
        self._items: list[tuple[Batch, LoadStats]] = []  # of the next step
        stream_state.start(
            dataset.streams,
            {},
            dataset.assignment.blend,
            self._cursor.batch(start_step) * self._train.global_batch_size,
        )
        workers = Workers(
            config.data.num_workers,
            max(config.data.prefetch, self._count),
            config.data.prefetch_bytes,
            config.data.worker_timeout or config.hang_seconds,  # ``patience`` has less
            config.faults.max_worker_restarts,
            together=self._count,
            patience=SHARE_OF_HANG * config.hang_seconds,
        )
        finish = to_pinned if pinned else to_tensors
        self._server = server
        if server is not None:
            server.open(open_for_workers, config, dp_rank, dp_size, found)
        self._reader = ReadAhead(
            _Microbatches(dataset, self._cursor, self._count),
            self._numbers(),
            workers,
            finish,
            None if server is None else self._fork,
        )

    @property
    def sources(self) -> list[Indexed | Stream]:
        """Those of data.train."""
        return self._dataset.sources

    def digest(self, batches: int | None = None) -> str:
        """Of the order of the samples and the sizes of their shards, which must be those of all ranks; with
        ``batches`` of what the order of so many global batches depends on, which must be that of the run before."""
        found = xxhash.xxh3_64(self._dataset.assignment.blend.digest(batches).encode())
        for source in self.sources:
            found.update(source.identity.encode() if isinstance(source, Stream) else source.shard_bytes.tobytes())
        return found.hexdigest()

    @property
    def notes(self) -> list[str]:
        """What a user should know about the blend, the servers, the streams and the workers."""
        dataset, train = self._dataset, self._train
        blend = dataset.assignment.blend
        batch, parts = train.global_batch_size, train.num_microbatches
        shared = (
            stream_state.sharing(blend, source, lanes, batch, parts, self._dp_size)
            for source, (_, lanes) in dataset.streams.items()
        )
        return [*dataset.notes(), *filter(None, (more_than_cores(self._num_workers, self._dp_size), *shared))]

    @property
    def stream_states(self) -> stream_state.Table:
        """How far this rank has read the streams, up to the last step that it was given."""
        return stream_state.table(stream for stream, _ in self._dataset.streams.values())

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> StepData:
        data = self.load()
        self.deliver(data)
        return data

    def deliver(self, data: StepData) -> None:
        """Step ``data`` is trained on next: ``stream_states`` includes it."""
        for source, lane, state in data.stats.lanes:
            self._dataset.streams[source][0].delivered(lane, state)

    def load(self) -> StepData:
        """The data of the next step; ``deliver`` it, before it is trained on."""
        began, restarts = time.perf_counter(), self._reader.restarts
        transferred = self._reader.transfer_seconds
        while len(self._items) < self._count:  # kept, should a signal's handler raise in between
            self._items.append(next(self._reader))
        items, self._items = self._items, []
        read = sum((stats for _, stats in items), LoadStats())
        stats = dataclasses.replace(
            read,
            wait_seconds=time.perf_counter() - began,
            worker_restarts=self._reader.restarts - restarts,
            seconds=read.seconds + Counter({"transfer": self._reader.transfer_seconds - transferred}),
        )
        step = self._step
        self._step += 1
        return StepData(step, self._cursor.batch(step), [batch for batch, _ in items], stats)

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def seek(self, step: int, cursor: Cursor, streams: stream_state.Table | None = None) -> list[str]:
        """Continue at ``step`` with ``cursor``, e.g. after a rollback: what was read ahead is dropped. Streams are
        read on from the states of a checkpoint. Warnings."""
        self._step, self._cursor, self._items = step, cursor, []
        blend = self._dataset.assignment.blend
        position = cursor.batch(step) * self._train.global_batch_size
        notes = stream_state.start(self._dataset.streams, streams or {}, blend, position)
        self._reader.seek(_Microbatches(self._dataset, cursor, self._count), self._numbers())
        return notes

    def is_ready(self) -> bool:
        """Whether the next step's data is there, so that ``next`` waits for no worker."""
        return self._step < self._stop and self._reader.is_ready(self._count - len(self._items))

    def close(self) -> None:
        """End the worker processes at once; nothing comes after it."""
        self._reader.close()
        for stream, _ in self._dataset.streams.values():
            stream.close()

    @property
    def worker_pids(self) -> list[int]:
        """The worker processes that run now."""
        return self._reader.pids

    def _fork(self, descriptors: Sequence[int], seconds: float) -> Process:
        """A worker that goes on from the state of this loader, made by the server within ``seconds``."""
        assert self._server is not None
        state = WorkerState(self._cursor, self._count, self._step * self._count, self.stream_states)
        return self._server.fork(state, descriptors, seconds)

    def _numbers(self) -> range:
        return range(self._step * self._count, self._stop * self._count)


@dataclass(frozen=True)
class _Microbatches:
    """The microbatches of all steps one after the other: number k is the ``k % parts``-th of step ``k // parts``."""

    dataset: MicrobatchDataset
    cursor: Cursor
    parts: int  # microbatches a step

    def count(self, k: int) -> int:
        return self.dataset.assignment.batch_size

    def pins(self, k: int) -> list[int | None]:
        return self.dataset.pins(self._number(k))

    def samples(self, k: int, which: Sequence[int]) -> Iterator[Made]:
        return self.dataset.samples(self._number(k), which)

    def pack(self, k: int, samples: list[Made]) -> Any:
        return to_arrays(self.dataset.pack(self._number(k), samples, k // self.parts))

    def describe(self, k: int, sample: int | None) -> str:
        number = self._number(k)
        what = "the packing of its samples" if sample is None else f"sample {self.dataset.key(number, sample)}"
        return f"batch {number // self.parts}, {what}"

    def _number(self, k: int) -> int:
        step, part = divmod(k, self.parts)
        return self.cursor.batch(step) * self.parts + part


@dataclass(frozen=True)
class WorkerState:
    """Of a loader, for a new worker. ``first``: the next item of ``_Microbatches``."""

    cursor: Cursor
    parts: int
    first: int
    streams: stream_state.Table


def open_for_workers(
    config: RunConfig, dp_rank: int, dp_size: int, found: Found | None
) -> Callable[[WorkerState], Callable[[Sequence[int]], None]]:
    """For a ``WorkerServer``: opens the data; gives what makes the main function of a worker of ``Loader._fork``."""
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    dataset = MicrobatchDataset(config, modalities, dp_rank=dp_rank, dp_size=dp_size, found=found)

    def prepare(state: WorkerState) -> Callable[[Sequence[int]], None]:
        stream_state.start(dataset.streams, state.streams, dataset.assignment.blend, 0)  # the table has all of them
        source = _Microbatches(dataset, state.cursor, state.parts)
        source.describe(state.first, 0)  # before the fork, so that workers share what it computes
        return partial(run_worker, source)

    return prepare
