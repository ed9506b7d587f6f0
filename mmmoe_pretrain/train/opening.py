"""Opens data.train on the ranks of a job, refuses what differs between machines or serves no objective, and logs what
it holds."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data import shared
from mmmoe_pretrain.data.loader import Loader
from mmmoe_pretrain.data.sources.listing import is_absent
from mmmoe_pretrain.data.sources.source import Indexed
from mmmoe_pretrain.data.sources.survey import refuse_useless, survey
from mmmoe_pretrain.data.workers.replica import ReplicaLoader
from mmmoe_pretrain.data.workers.server import WorkerServer
from mmmoe_pretrain.modalities import Modalities
from mmmoe_pretrain.objectives import objectives_of
from mmmoe_pretrain.parallel.agreement import agree, exchange, from_rank_0
from mmmoe_pretrain.parallel.groups import Groups, HostGroups
from mmmoe_pretrain.parallel.replica import ReplicaChannel
from mmmoe_pretrain.parallel.runtime import allow_many_files

log = logging.getLogger(__name__)


@contextmanager
def worker_server(config: RunConfig) -> Iterator[WorkerServer | None]:
    """The process that forks this rank's data workers. Enter it before the process uses a GPU or starts a thread."""
    if not config.data.num_workers:
        yield None
        return
    allow_many_files()  # the workers have the limit of now
    with WorkerServer() as server:
        yield server


def open_data(
    config: RunConfig,
    modalities: Modalities,
    groups: Groups,
    host: HostGroups,
    channel: ReplicaChannel | None,
    device: torch.device | None = None,
    server: WorkerServer | None = None,
) -> Loader | ReplicaLoader:
    """The loader of each rank. Rank 0 lists the shards, and one rank of each machine looks at them. ``device``: that
    batches go to. ``server``: it forks the data workers, or this rank does. Collective."""
    reads = channel is None or channel.is_source
    if server is not None and not reads:
        server.close()
    found = from_rank_0(host.storage, lambda: shared.find(config, modalities, groups.data_size))
    first = exchange(host.storage, lambda: socket.gethostname() if reads else None, _first_of_other_machines)
    looks = dist.get_rank() in first
    agree(host.storage, lambda: shared.look(config, modalities, found) if looks else None)

    def open_here() -> Loader:
        rank, size = groups.data_rank, groups.data_size
        pinned = device is not None and device.type == "cuda"
        return Loader(config, modalities, dp_rank=rank, dp_size=size, found=found, pinned=pinned, server=server)

    return agree(
        host.storage,
        lambda: open_here() if channel is None else ReplicaLoader(channel, open_here, 0, config.train.steps),
    )


def check_data(config: RunConfig, host: HostGroups, loader: Loader | ReplicaLoader, main: bool) -> None:
    """Raises ValueError on every rank where the ranks see different shards, or no objective can use any sample.
    ``main``: of rank 0, which logs what there is. Collective."""
    exchange(host.storage, loader.digest, _refuse_different_data)
    agree(host.storage, lambda: survey_data(config, loader) if main else None)


def _first_of_other_machines(names: Sequence[str | None]) -> set[int]:
    """Of all ranks that read, on rank 0, which has looked at the shards of its own machine."""
    return {names.index(name) for name in {*names} - {None, names[0]}}


def _refuse_different_data(digests: Sequence[str | None]) -> None:
    """Of all ranks, on rank 0; None of those that do not read."""
    others = [rank for rank, digest in enumerate(digests) if digest not in (None, digests[0])]
    if others:
        raise ValueError(
            f"the shards of data.train are not the same on all machines: rank {others[0]} sees others than rank 0, "
            f"and samples would be lost and repeated; copy the same files to each, or name a folder that all share"
        )


def survey_data(config: RunConfig, loader: Loader | ReplicaLoader) -> None:
    """Log what data.train holds and what is not read. Raises ValueError where no objective can use any of it; what
    streams hold is known once they are read. For rank 0."""
    indexed = [source for source in loader.sources if isinstance(source, Indexed)]
    found = survey(indexed)
    streams = len(loader.sources) - len(indexed)
    unserved = [] if streams else refuse_useless(indexed, found, objectives_of(config).needs())
    if streams:
        log.info(
            "data.train: %d of %d sources are streams, whose samples are not known", streams, len(loader.sources)
        )
    if indexed:
        log.info("data.train: %s samples: %s", f"{found.samples:,}", found.content())
    for note in loader.notes:
        log.warning("%s", note)
    if found.unread:
        log.warning("files of data.train that are not read: %s; docs/data_format.md has the rule", found.left_out())
    if unserved:
        log.warning("no sample of data.train serves these objectives: %s", ", ".join(unserved))
    for path in config.evaluate.test:
        if is_absent(path):
            log.warning("evaluate.test: there is no %s, which mmmoe evaluate will need", path)
