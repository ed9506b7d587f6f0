"""A run that mixes streams with an indexed source: workers that die, rollbacks, batches sent ahead."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.data.loader import Loader
from mmmoe_pretrain.data.sources import stream_state
from mmmoe_pretrain.data.workers.replica import ReplicaLoader
from mmmoe_pretrain.modalities import Modalities, build_modalities
from tests.support import things, tiny_config, tiny_values, write_shards

STEPS, SHARDS = 6, 4
Read = dict[tuple[int, int], list[str]]  # (step, microbatch) -> the keys of the global microbatch


@pytest.fixture(scope="module")
def config(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("streams")
    rows = things(23)
    for shard in range(SHARDS):
        write_shards(folder / f"{shard}", rows[shard::SHARDS], lacking=("audio",))
    values = tiny_values(tiny_data)
    streams = {"path": f"pipe:cat {folder}/{{0..{SHARDS - 1}}}/00000.tar", "stream_window": 3}
    data = {**values["data"], "train": [*values["data"]["train"], streams], "lanes": 8}
    return tiny_config(tiny_data, data=data, train={"steps": STEPS, "global_batch_size": 16, "num_microbatches": 2})


@pytest.fixture(scope="module")
def modalities(config: RunConfig) -> Modalities:
    return build_modalities(config.modalities, config.data.tokenizer)


def read(
    config: RunConfig, modalities: Modalities, steps: range, ranks: int, workers: int,
    saved: stream_state.Table | None = None, cursor: Cursor | None = None, kill: bool = False,
) -> tuple[Read, stream_state.Table]:  # fmt: skip
    """What ``ranks`` read together in these steps, and the state after them."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": workers})})
    found: Read = {}
    tables = []
    for rank in range(ranks):
        with Loader(config, modalities, dp_rank=rank, dp_size=ranks, stop_step=steps.stop) as loader:
            assert loader.seek(steps.start, cursor or Cursor(), saved) == []
            for data in loader:
                for number, microbatch in enumerate(data.microbatches):
                    found.setdefault((data.step, number), []).extend(meta.key for meta in microbatch.metas)
                if kill and loader.worker_pids:
                    os.kill(loader.worker_pids[0], signal.SIGKILL)
                    kill = False
            tables.append(loader.stream_states)
    return {place: sorted(keys) for place, keys in found.items()}, stream_state.merged(tables)


@pytest.fixture(scope="module")
def undisturbed(config: RunConfig, modalities: Modalities) -> Read:
    found, _ = read(config, modalities, range(STEPS), 1, 0)
    assert sum(map(len, found.values())) == STEPS * 16
    return found


@pytest.mark.parametrize(("stop", "before", "after"), [(1, (1, 0), (4, 0)), (3, (2, 1), (1, 2)), (5, (4, 0), (2, 0))])
def test_a_loader_that_resumes_at_another_size_reads_streams_on(
    config: RunConfig, modalities: Modalities, undisturbed: Read, stop: int, before: tuple[int, int],
    after: tuple[int, int],
) -> None:  # fmt: skip
    first, states = read(config, modalities, range(stop), *before)
    saved = stream_state.from_json(stream_state.to_json(states))
    second, _ = read(config, modalities, range(stop, STEPS), *after, saved)
    assert first | second == undisturbed
    (lanes,) = states.values()
    comes_next = stream_state.first_numbers(Loader(config, modalities)._dataset.assignment.blend, 1, 4, stop * 16)
    assert all(0 <= number - lane.number <= 3 for number, lane in zip(comes_next, lanes, strict=True)), "a window"


def test_a_loader_whose_worker_is_killed_reads_streams_on(
    config: RunConfig, modalities: Modalities, undisturbed: Read
) -> None:
    assert read(config, modalities, range(STEPS), 1, 2, kill=True)[0] == undisturbed


def test_skipped_batches_of_a_rollback_are_passed_in_the_streams(
    config: RunConfig, modalities: Modalities, undisturbed: Read
) -> None:
    _, states = read(config, modalities, range(1), 1, 0)
    found, _ = read(config, modalities, range(1, STEPS - 2), 2, 0, states, Cursor(((2, 4),)))
    wanted = {1: 1, 2: 4, 3: 5}  # step -> batch
    assert found == {(step, part): undisturbed[batch, part] for step, batch in wanted.items() for part in range(2)}


class OneRank:
    """A channel whose source has no receivers."""

    is_source = True

    def post(self, content: Sequence[bytes | memoryview] = ()) -> None: ...
    def finish(self) -> memoryview:
        return memoryview(b"")

    def abandon(self) -> None: ...


def test_a_batch_that_is_sent_ahead_is_not_yet_in_the_state(
    config: RunConfig, modalities: Modalities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loader, "is_ready", lambda loader: True)  # the next step is read while this one is trained on
    alone = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    with (
        Loader(alone, modalities) as wanted,
        ReplicaLoader(OneRank(), lambda: Loader(alone, modalities), 0, STEPS) as found,
    ):
        found.seek(0, Cursor())
        for _ in range(STEPS - 1):
            next(wanted)
            next(found)
            assert found.stream_states == wanted.stream_states
