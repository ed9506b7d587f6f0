"""Wherever the shards lie, and whatever ranks, workers, cache and restarts: the same samples, each once an epoch.

``COVER`` has every pair of values of any two of the settings. Each case resumes after another step, at the ranks and
workers of the next case. All cases together are slow. Then what happens within a run that mixes streams with indexed
shards: workers that are killed, rollbacks, batches that are sent ahead.
"""

from __future__ import annotations

import itertools
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import xxhash

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data import shared
from mmmoe_pretrain.data.cursor import Cursor
from mmmoe_pretrain.data.loader import Loader, StepData
from mmmoe_pretrain.data.sources import stream_state
from mmmoe_pretrain.data.workers.replica import ReplicaLoader
from mmmoe_pretrain.data.workers.server import WorkerServer
from mmmoe_pretrain.modalities import Modalities, build_modalities
from tests.data.servers import every, http_server, s3_server, upload
from tests.support import things, tiny_config, tiny_values, write_shards, write_tokenizer

STEPS, BATCH, PARTS, LANES, WINDOW = 5, 16, 2, 8, 3
EPOCH = 40  # samples of each source: two epochs in all steps, or one of each source of the blend
SIZES = (3, 17, 8, 12)  # of the indexed shards; the sub-lanes of the stream are as long as each other


class Case(NamedTuple):
    sources: str
    store: str
    cache: bool
    ranks: int
    workers: int
    level: bool


COVER = [
    Case("indexed", "local", False, 1, 3, False),
    Case("stream", "http", True, 1, 1, False),
    Case("blend", "s3", False, 1, 0, True),
    Case("stream", "local", True, 2, 0, True),
    Case("blend", "http", True, 2, 3, False),
    Case("indexed", "s3", False, 2, 1, True),
    Case("blend", "local", False, 4, 1, True),
    Case("indexed", "http", True, 4, 0, False),
    Case("stream", "s3", True, 4, 3, False),
    Case("indexed", "local", False, 8, 0, False),
    Case("stream", "http", False, 8, 3, True),
    Case("blend", "s3", True, 8, 1, True),
]
VALUES = [("indexed", "stream", "blend"), ("local", "http", "s3"), (False, True), (1, 2, 4, 8), (0, 1, 3),
          (False, True)]  # fmt: skip
ALL = list(itertools.starmap(Case, itertools.product(*VALUES)))

# (step or batch, microbatch, "samples") -> key and digest of each; ..., "targets") -> ids that captions predict
Read = dict[tuple[int, int, str], list[Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exact")
    rows = iter(things(2 * EPOCH))
    shards = {f"indexed/{n}": size for n, size in enumerate(SIZES)} | {f"stream/{n}": EPOCH // 4 for n in range(4)}
    for name, size in shards.items():
        folder = write_shards(root / name, list(itertools.islice(rows, size)), lacking=("audio",))
        (folder / "00000.tar").rename(root / f"{name}.tar")
        folder.rmdir()
    write_tokenizer(root / "tokens.model")
    return root


@pytest.fixture(scope="module")
def stores(root: Path) -> Iterator[Mapping[str, tuple[str, str]]]:
    """Where the folders lie by store: as a URL, and for a command that prints a file. One request in ten to the
    server of http fails."""
    with http_server(root) as server, s3_server() as endpoint:
        server.faults = every(10, "error", "short", "reset")
        for path in root.glob("*/*.tar"):
            upload(endpoint, path, str(path.relative_to(root)))
        yield {
            "local": (str(root), f"cat {root}"),
            "http": (server.url, f"curl -sf {server.url}"),
            "s3": ("s3://bucket", f"curl -sf {endpoint}/bucket"),
        }
        assert server.failed or len(server.requests) < 10


def config_of(root: Path, case: Case, where: tuple[str, str], endpoint: str, cache: Path | None = None) -> RunConfig:
    values = tiny_values(root)
    values["modalities"]["text"]["dropout"] = 0.2  # what a position draws shows in the arrays
    shards = "/{0..3}.tar" * (case.store == "s3")  # a client of S3 that lists a folder takes half a second to start
    indexed = {"path": f"{where[0]}/indexed{shards}"}
    stream = {"path": f"pipe:{where[1]}/stream/{{0..3}}.tar", "stream_window": WINDOW}
    data: dict[str, Any] = {
        **values["data"],
        "train": {"indexed": [indexed], "stream": [stream], "blend": [indexed, stream]}[case.sources],
        "lanes": LANES,
        "shuffle_window": 2 * LANES,  # of 40 samples: lanes, chunks and windows decide the order
        "shuffle_chunk": 4,
        "level_tokens": case.level,
        "storage_options": {"s3": {"endpoint_url": endpoint}} if case.store == "s3" else {},
        "cache": {"folder": str(cache), "size_gb": 0.1, "block_mb": 1} if case.cache and cache else None,
    }
    train = {"steps": STEPS, "global_batch_size": BATCH, "num_microbatches": PARTS}
    return tiny_config(root, data=data, train=train, modalities=values["modalities"])


def local(root: Path, sources: str, **data: Any) -> RunConfig:
    """Of shards on this machine, with these changes of its section ``data``."""
    config = config_of(root, Case(sources, "local", False, 1, 0, False), (str(root), f"cat {root}"), "")
    return config.model_copy(update={"data": config.data.model_copy(update=data)})


def digests(batch: Batch) -> list[str]:
    """Of each sample its key and what the model sees of it: the pixels, and the tokens of its text."""
    pixels, segments = batch.inputs["image"]["pixels"].numpy(), batch.segment_ids.numpy()
    assert len(pixels) == len(batch.metas)
    found = []
    for b, meta in enumerate(batch.metas):
        tokens = [batch.keys.numpy()[segments == int(its[b])] for its in batch.pooled.values() if its[b] >= 0]
        shown = np.concatenate([np.frombuffer(array.tobytes(), np.uint8) for array in (pixels[b], *tokens)])
        found.append(f"{meta.key} {xxhash.xxh3_64_hexdigest(shown.tobytes())}")
    return found


def collect(found: Read, data: StepData, step: int) -> None:
    for number, batch in enumerate(data.microbatches):
        found.setdefault((step, number, "samples"), []).extend(digests(batch))
        found.setdefault((step, number, "targets"), []).extend(batch.targets["captioning"].ids.tolist())


def read(
    config: RunConfig, modalities: Modalities, steps: range, ranks: int, workers: int, saved: stream_state.Table
) -> tuple[Read, stream_state.Table]:
    """What the ranks read in these steps, one rank after the other, and the state of the streams after them."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": workers})})
    opened, tables, found = shared.find(config, modalities, ranks), [], Read()
    random_state = torch.random.get_rng_state()
    for rank in range(ranks):
        with Loader(config, modalities, dp_rank=rank, dp_size=ranks, stop_step=steps.stop, found=opened) as loader:
            assert loader.seek(steps.start, Cursor(), saved) == []
            for data in loader:
                assert len(data.microbatches) == PARTS and data.stats.samples == BATCH // ranks
                assert not data.stats.bad
                collect(found, data, data.step)
            tables.append(loader.stream_states)
    assert torch.equal(torch.random.get_rng_state(), random_state), "the model's random numbers are its own"
    return found, stream_state.from_json(stream_state.to_json(stream_state.merged(tables)))


@pytest.fixture(scope="module")
def modalities(root: Path) -> Modalities:
    config = local(root, "indexed")
    return build_modalities(config.modalities, config.data.tokenizer)


@pytest.fixture(scope="module")
def undisturbed(root: Path, modalities: Modalities) -> Mapping[str, Read]:
    """Of each kind of sources, what one rank without workers reads of local shards."""
    return {sources: read(local(root, sources), modalities, range(STEPS), 1, 0, {})[0]
            for sources in ("indexed", "stream", "blend")}  # fmt: skip


def test_every_sample_comes_once_an_epoch_in_another_order(undisturbed: Mapping[str, Read]) -> None:
    keys = [f"thing-{n:03d}" for n in range(2 * EPOCH)]
    served = {sources: [sample.split()[0] for (*_, kind), part in its.items() if kind == "samples" for sample in part]
              for sources, its in undisturbed.items()}  # fmt: skip
    for sources, own in (("indexed", keys[:EPOCH]), ("stream", keys[EPOCH:])):
        first, second = served[sources][:EPOCH], served[sources][EPOCH:]
        assert sorted(first) == sorted(second) == own
        assert first != second and own not in (first, second)
    assert sorted(served["blend"]) == keys


def test_the_cases_cover_every_pair_of_settings() -> None:
    for i, j in itertools.combinations(range(len(VALUES)), 2):
        assert {(case[i], case[j]) for case in COVER} == {*itertools.product(VALUES[i], VALUES[j])}


def name(case: Case) -> str:
    cache, level = "-cache" * case.cache, "-level" * case.level
    return f"{case.sources}-{case.store}{cache}-{case.ranks}-ranks-{case.workers}-workers{level}"


@pytest.mark.parametrize(
    ("cases", "number"),
    [pytest.param(COVER, n, id=name(case)) for n, case in enumerate(COVER)]
    + [pytest.param(ALL, n, id=f"all-{name(case)}", marks=pytest.mark.slow) for n, case in enumerate(ALL)],
)
def test_the_global_batches_are_the_same_before_and_after_a_restart(
    cases: list[Case], number: int, root: Path, stores: Mapping[str, tuple[str, str]], modalities: Modalities,
    undisturbed: Mapping[str, Read], tmp_path: Path,
) -> None:  # fmt: skip
    case, then = cases[number], cases[(number + 1) % len(cases)]
    stop, wanted = number % STEPS, undisturbed[case.sources]
    endpoint = stores["s3"][1].removeprefix("curl -sf ").removesuffix("/bucket")
    config = config_of(root, case, stores[case.store], endpoint, tmp_path / "cache")
    first, states = read(config, modalities, range(stop), case.ranks, case.workers, {}) if stop else ({}, {})
    second, _ = read(config, modalities, range(stop, STEPS), then.ranks, then.workers, states)
    found = first | second
    assert found.keys() == wanted.keys()
    for place, samples in found.items():
        if case.level:  # ranks have exchanged some
            assert Counter(samples) == Counter(wanted[place])
        else:
            assert samples == wanted[place]
    assert (tmp_path / "cache").exists() == (case.cache and case.store != "local" and case.sources != "stream")


@pytest.mark.parametrize("served", [False, True], ids=["forked by the rank", "by a server"])
def test_a_loader_whose_workers_are_killed_reads_the_same_batches(
    root: Path,
    modalities: Modalities,
    undisturbed: Mapping[str, Read],
    caplog: pytest.LogCaptureFixture,
    served: bool,
) -> None:
    """The samples of a sub-lane have one worker each: another one takes its stream over."""
    found, restarts, config = Read(), 0, local(root, "blend", num_workers=2, prefetch=1)
    with (
        caplog.at_level(logging.WARNING),
        WorkerServer() if served else nullcontext() as server,
        Loader(config, modalities, stop_step=STEPS, server=server) as loader,
    ):
        for data in loader:
            collect(found, data, data.step)
            restarts += data.stats.worker_restarts
            if data.step < config.faults.max_worker_restarts:
                os.kill(loader.worker_pids[data.step % 2], signal.SIGKILL)
    assert found == undisturbed["blend"]
    assert sum("a data worker died (SIGKILL)" in message for message in caplog.messages) == restarts >= 1


@pytest.mark.parametrize("workers, served", [(0, False), (2, False), (2, True)])
def test_a_skipped_window_is_left_out_from_the_start_and_after_going_back(
    root: Path, modalities: Modalities, undisturbed: Mapping[str, Read], workers: int, served: bool
) -> None:
    config = local(root, "blend", num_workers=workers)
    with (
        WorkerServer() if served else nullcontext() as server,
        Loader(config, modalities, stop_step=3, server=server) as loader,
    ):
        first, saved = next(loader), stream_state.to_json(loader.stream_states)
        next(loader)
        assert loader.seek(1, Cursor().skip(0, 3, step=1), stream_state.from_json(saved)) == []
        gone_back = [first, *loader]
    for steps in (gone_back, list(Loader(config, modalities, stop_step=3, cursor=Cursor(((1, 3),))))):
        assert [(data.step, data.batch) for data in steps] == [(0, 0), (1, 3), (2, 4)]
        found = Read()
        for data in steps:
            collect(found, data, data.batch)
        assert found == {place: its for place, its in undisturbed["blend"].items() if place[0] in (0, 3, 4)}


def test_the_state_of_a_stream_is_at_most_a_window_behind_what_comes_next(root: Path, modalities: Modalities) -> None:
    config = local(root, "stream")
    _, states = read(config, modalities, range(3), 4, 0, {})
    comes_next = stream_state.first_numbers(Loader(config, modalities)._dataset.assignment.blend, 0, 4, 3 * BATCH)
    ((*lanes,),) = states.values()
    assert all(0 <= number - lane.number <= WINDOW for number, lane in zip(comes_next, lanes, strict=True))


class OneRank:
    """A channel whose source has no receivers."""

    is_source = True

    def post(self, content: Sequence[bytes | memoryview] = ()) -> None: ...
    def finish(self) -> memoryview:
        return memoryview(b"")

    def abandon(self) -> None: ...


def test_a_batch_that_is_sent_ahead_is_not_yet_in_the_state(
    root: Path, modalities: Modalities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loader, "is_ready", lambda loader: True)  # the next step is read while this one is trained on
    config = local(root, "blend")
    with (
        Loader(config, modalities) as wanted,
        ReplicaLoader(OneRank(), lambda: Loader(config, modalities), 0, STEPS) as found,
    ):
        found.seek(0, Cursor())
        for _ in range(STEPS - 1):
            next(wanted)
            next(found)
            assert found.stream_states == wanted.stream_states
