"""The parts of ``benchmarks/control_plane.py``, each a call of what a job calls: what it costs at a number of
ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch.distributed as dist

from benchmarks.control.ranks import Cost, on_simulated_ranks
from benchmarks.control.state import Ranges, job_of, ranges_of_buckets, states_of
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.files import FileRecord, header_of
from mmmoe_pretrain.checkpoint.names import BOXES, INDEX, MANIFEST, folder_name
from mmmoe_pretrain.checkpoint.save_plan import SavePlan, commit, plan_save
from mmmoe_pretrain.checkpoint.storage import LocalStorage
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data import shared
from mmmoe_pretrain.data.order.assign import Assignment
from mmmoe_pretrain.data.order.lengths import Estimate, Fit, Line
from mmmoe_pretrain.data.sources.index import Rows, Writer
from mmmoe_pretrain.data.sources.indexing import places
from mmmoe_pretrain.data.sources.listing import list_shards
from mmmoe_pretrain.data.storage.files import Files, read_settings
from mmmoe_pretrain.modalities import Modalities, build_modalities
from mmmoe_pretrain.parallel.agreement import from_rank_0
from mmmoe_pretrain.parallel.groups import HostGroups
from mmmoe_pretrain.plan.build import build
from mmmoe_pretrain.train.heartbeats import Heartbeat, HeartbeatStore, silent_ranks, stalled_ranks
from mmmoe_pretrain.train.start import check_same_config
from mmmoe_pretrain.train.watchdog import MAX_TICK

LOOKING = 3  # ranks that run where all would do the same with the same message
EACH = 4  # samples of a rank in a microbatch
BATCHES = 8  # microbatches that are timed
FAR = 10**5  # the step of the seek
SHARD = 10_000  # samples of each of ``shards`` whose order is asked for: 10^9 of 10^5
KIND = ("jpg", "caption.txt")


@dataclass(frozen=True)
class Figures:
    """``first``, ``others``: seconds of rank 0, and of the slowest other rank that was looked at. ``received``,
    ``sent``: bytes of rank 0. ``files``: bytes of what it writes or a rank reads of shared files for it."""

    first: float
    others: float = 0.0
    received: float = 0.0
    sent: float = 0.0
    files: float = 0.0

    @classmethod
    def of(cls, cost: Cost[Any], files: float = 0.0) -> Figures:
        """With the bytes of files."""
        return cls(cost.first, cost.others, cost.received, cost.sent, files)

    @property
    def seconds(self) -> float:
        return max(self.first, self.others)

    @property
    def nbytes(self) -> float:
        return self.received + self.sent + self.files


def plan_part(config: RunConfig, ranks: int) -> Figures:
    """The layout, its groups and the models of a rank of each stage, as ``mmmoe plan`` and every start make them."""
    began = time.process_time()
    build(config, ranks)
    return Figures(time.process_time() - began)


def start_part(config: RunConfig, ranks: int) -> Figures:
    """All ranks agree that they have the same config."""
    return Figures.of(on_simulated_ranks(ranks, lambda _, group: check_same_config(config, HostGroups(group, group))))


def checkpoint_parts(config: RunConfig, ranks: int, ranges: Ranges, folder: Path) -> Iterator[tuple[str, Figures]]:
    """Who writes what; the index, as it is written; what a rank of another layout reads."""
    cost = save_plans(config, ranks, ranges)
    yield "save plan", Figures.of(cost)
    checkpoint, figures = written(cost.results, folder)
    yield "index of a save", figures
    other = config.model_copy(update={"parallel": config.parallel.model_copy(update={"expert_parallel_size": 4})})
    mine = states_of(job_of(other, ranks), ranges_of_buckets, min(ranks, LOOKING))
    with counted_reads() as read:
        found = on_simulated_ranks(
            ranks, lambda rank, group: store.plan_reads(checkpoint, mine[rank], group), present=LOOKING
        )
    yield "load plan", Figures.of(found, max(read.values()))


def save_plans(config: RunConfig, ranks: int, ranges: Ranges) -> Cost[SavePlan]:
    """That of every rank."""
    states = states_of(job_of(config, ranks), ranges)
    return on_simulated_ranks(ranks, lambda rank, group: plan_save(states[rank], group))


def written(plans: list[SavePlan], folder: Path) -> tuple[store.Checkpoint, Figures]:
    """A checkpoint whose files of tensors have their sizes, and no numbers."""
    storage = LocalStorage(str(folder))
    draft = storage.draft(folder_name(1))
    storage.make_folder(draft)
    records = [FileRecord(plan.file, len(header_of(plan.entries)[0]) + plan.nbytes, "0" * 32) for plan in plans]
    for record in records:
        with (folder / draft / record.name).open("wb") as file:
            file.truncate(record.nbytes)
    began = time.perf_counter()
    checkpoint = commit(storage, draft, 1, plans[0], records, {})
    seconds = time.perf_counter() - began
    sizes = storage.sizes(checkpoint.name)
    return checkpoint, Figures(seconds, files=sum(sizes[name] for name in (INDEX, BOXES, MANIFEST)))


@contextmanager
def counted_reads() -> Iterator[dict[str, int]]:
    """Inside, bytes of boxes.bin that are read, by thread."""
    found: dict[str, int] = {"": 0}
    original = LocalStorage.reader

    @contextmanager
    def reader(self: LocalStorage, path: str) -> Iterator[Callable[[int, memoryview], None]]:
        with original(self, path) as read_into:

            def counted(at: int, buffer: memoryview) -> None:
                name = threading.current_thread().name
                found[name] = found.get(name, 0) + len(buffer)
                read_into(at, buffer)

            yield counted

    with mock.patch.object(LocalStorage, "reader", reader):
        yield found


def heartbeat_part(ranks: int) -> Figures:
    """Rank 0's work for a second of heartbeats, through the store that a job has."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    beats = HeartbeatStore(server)
    server.set("hang", '""')
    sent = 0
    for rank in range(ranks):
        beat = Heartbeat(rank, step=1000, phase="step", count=7, age=1.25, longest=10.5, sequence=200)
        beats.publish(beat, 60.0)
        sent += len(beat.to_json())
    rounds = 3
    began = time.process_time()
    for _ in range(rounds):
        _, found = beats.read(range(ranks), 60.0)
        assert not silent_ranks(found, dict.fromkeys(found, 0.0), 60.0) and not stalled_ranks(found, 60.0)
    seconds = (time.process_time() - began) / rounds
    return Figures(seconds / MAX_TICK, received=sent / MAX_TICK, sent=sent / MAX_TICK)


def data_config(config: RunConfig, ranks: int, shards: int) -> RunConfig:
    """One source of ``shards`` in a bucket, and EACH samples of a rank in a microbatch."""
    source = {"path": f"s3://bucket/train/{{{0:06d}..{shards - 1:06d}}}.tar"}
    values = config.model_dump(mode="json")
    values["data"]["train"] = [source]
    values["train"] |= {"num_microbatches": 1, "global_batch_size": EACH * ranks}
    return RunConfig.model_validate(values)


def modalities_of(config: RunConfig) -> Modalities:
    return build_modalities(config.modalities, decoding=False)


def write_index(config: RunConfig, samples: int) -> None:
    """The index of the shards of ``config``, where ranks look for it."""
    with closing(Files(read_settings(config))) as files:
        listing = list_shards(config.data.train[0].path, files)
    (path,) = places(listing, "")
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = "".join(f"{i:04d}" for i in range(samples)).encode()
    rows = Rows(
        keys, np.arange(1, samples + 1) * 4, (KIND,), np.zeros(samples, dtype=np.int32),
        512 + 1024 * np.arange(2 * samples), np.tile([60_000, 300], samples),
    )  # fmt: skip
    with Writer(path) as writer:
        for shard in listing.shards:
            writer.add(shard.url, "1", 1 << 30, rows)


def index_part(config: RunConfig, ranks: int) -> Figures:
    """Rank 0 lists and opens the source; every rank gets the list, and opens the index."""
    unlevelled = config.model_copy(update={"data": config.data.model_copy(update={"level_tokens": False})})
    modalities = modalities_of(config)

    def open_here(rank: int, group: Any) -> int:
        found = from_rank_0(group, lambda: shared.find(unlevelled, modalities, ranks))
        with closing(Files(read_settings(config))) as files:
            return len(shared.open_sources(unlevelled, modalities, files, found, "none"))

    return Figures.of(on_simulated_ranks(ranks, open_here, present=LOOKING))


class Described:
    """A source that is known by its sizes alone: the order asks for nothing else."""

    def __init__(self, shards: int, modalities: Modalities) -> None:
        self.shard_sizes, self.modalities = np.full(shards, SHARD), modalities

    def sizes_of(self, indices: np.ndarray, modality: str) -> np.ndarray:
        """Bytes, which vary from sample to sample."""
        return {"image": 40_000, "caption": 50}.get(modality, 0) * (1 + np.asarray(indices) % 7)


def order_parts(config: RunConfig, ranks: int, shards: int) -> Iterator[tuple[str, Figures]]:
    """Seek to a far step, whose epoch is then permuted; then a rank's share of a microbatch."""
    modalities = modalities_of(config)
    lines = {"image": Line(0.0, 1 / 200, 1.0, 196.0), "caption": Line(0.0, 0.25, 1.0, 62.0)}
    nothing = Line(0.0, 0.0, 0.0, 0.0)
    pattern = sum(1 << m for m, name in enumerate(modalities) if name in lines)
    fit = Fit(tuple(lines.get(name, nothing) for name in modalities), (1.0,) * len(modalities))
    assignment = Assignment(config, [Described(shards, modalities)], modalities, ranks, (Estimate({pattern: fit}),))
    began = time.process_time()
    assignment.of_rank(FAR, ranks - 1)
    yield "data order, seek", Figures(0.0, time.process_time() - began)
    began = time.process_time()
    for number in range(FAR + 1, FAR + 1 + BATCHES):
        assert len(assignment.of_rank(number, ranks - 1).positions) == EACH
    yield "data order, microbatch", Figures(0.0, (time.process_time() - began) / BATCHES)
