"""One rank of a model replica reads and decodes; its other ranks get the same batches, and its errors."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain.config import ParallelConfig
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.data.loader import Loader, Made, MicrobatchDataset
from mmmoe_pretrain.data.workers.replica import ReplicaLoader
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.mesh import build_host_groups
from mmmoe_pretrain.parallel.replica import build_replica_channel
from mmmoe_pretrain.parallel.runtime import process_group
from tests.data.test_loader import assert_same, batches, built, config_with
from tests.distributed import free_port, groups_of, run_ranks

pytestmark = pytest.mark.timeout(90)
STEPS = 5
LAYOUT = ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2, expert_parallel_size=1)


def on_ranks(ranks: int, root: Path, workers: int, use: Any) -> list[Any]:
    """``use(loader)`` on every rank of TP2 x PP2 x DP(ranks / 4)."""
    config = config_with(root, {"num_workers": workers})
    modalities = built(config)

    def rank() -> Any:
        with process_group(1.0):
            host, groups = build_host_groups(1.0), groups_of(LAYOUT, 4)
            channel = build_replica_channel(groups, host.control)
            assert channel is not None
            place = {"dp_rank": groups.data_rank, "dp_size": groups.data_size}
            with ReplicaLoader(
                channel, lambda: Loader(config, modalities, stop_step=STEPS, **place), 0, STEPS
            ) as loader:
                return use(loader)

    return run_ranks(ranks, rank)


def test_a_replica_gets_what_its_data_rank_would_read_and_decodes_it_once(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    log.touch()
    plain = MicrobatchDataset.samples

    def logged(dataset: MicrobatchDataset, number: int, which: Sequence[int]) -> Iterator[Made]:
        with log.open("a") as file:
            file.writelines(f"{position}\n" for position in dataset.positions(number)[list(which)])
        return plain(dataset, number, which)

    size = 2
    config = config_with(tiny_data)
    expected = [batches(Loader(config, built(config), stop_step=STEPS, dp_rank=r, dp_size=size)) for r in range(size)]
    monkeypatch.setattr(MicrobatchDataset, "samples", logged)

    def use(loader: ReplicaLoader) -> list[tuple[int, int, int]]:
        found, bad = [], []
        for data in loader:
            found.append((data.step, data.microbatches))
            bad.append((data.stats.samples, len(data.stats.bad), sum(data.stats.seconds.values()) > 0))
        mine = next((e for e in expected if e[0][1][0].metas == found[0][1][0].metas), None)
        assert mine is not None
        assert_same(found, mine)
        return bad

    counts = on_ranks(4 * size, tiny_data, 1, use)
    decoded = sorted(map(int, log.read_text().split()))
    assert decoded == list(range(STEPS * config.train.global_batch_size))  # each position once in the whole job
    assert sum(samples for rank in counts for samples, *_ in rank) == STEPS * config.train.global_batch_size
    assert sum(any(busy for *_, busy in rank) for rank in counts) == size  # one rank of each replica works


def test_a_replica_seeks_together_and_may_stop_in_the_middle(tiny_data: Path) -> None:
    config = config_with(tiny_data)
    expected = list(Loader(config, built(config), stop_step=STEPS))

    def use(loader: ReplicaLoader) -> None:
        loader.seek(1, Cursor())
        got = [next(loader), next(loader)]
        loader.seek(0, Cursor(((1, 2),)))
        got += [next(loader), next(loader)]
        for data, batch in zip(got, (1, 2, 0, 2), strict=True):
            assert data.batch == batch
            assert_same(data.microbatches, expected[batch].microbatches)

    on_ranks(4, tiny_data, 1, use)


def test_an_error_of_the_rank_that_reads_ends_all_at_the_same_step(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = MicrobatchDataset.samples

    def broken(dataset: MicrobatchDataset, number: int, which: Sequence[int]) -> Iterator[Made]:
        if number >= 4:  # two microbatches a step
            raise ValueError("shard x was changed; restore it")
        return plain(dataset, number, which)

    monkeypatch.setattr(MicrobatchDataset, "samples", broken)

    def use(loader: ReplicaLoader) -> int:
        steps = 0
        with pytest.raises(ValueError, match=r"^shard x was changed; restore it$"):
            for _ in loader:
                steps += 1
        return steps

    assert on_ranks(4, tiny_data, 0, use) == [2] * 4


def test_a_rank_that_fails_does_not_wait_for_the_batch_that_it_was_to_get() -> None:
    port = free_port()

    def rank(number: int) -> None:
        os.environ.update(RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with process_group(1.0):
            channel = build_replica_channel(Groups(tensor_size=2, tensor_rank=number), None)
            assert channel is not None
            if number:
                channel.post()
                channel.abandon()
                sys.exit(3)
            time.sleep(60)  # its frame never comes

    processes = [multiprocessing.get_context("fork").Process(target=rank, args=(number,)) for number in range(2)]
    for process in processes:
        process.start()
    try:
        processes[1].join(30)
        assert processes[1].exitcode == 3
    finally:
        for process in processes:
            process.kill()
            process.join()
