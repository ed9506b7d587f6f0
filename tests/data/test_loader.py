"""Whatever the layout, the workers and the restarts: the same samples in the same places."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmmoe_pretrain.batch import AttentionBlocks, Batch, Targets
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.evaluation import iterate_eval, text_batches
from mmmoe_pretrain.data.loader import Loader, StepData
from mmmoe_pretrain.data.order.assign import microbatch_size
from mmmoe_pretrain.modalities import Modalities, build_modalities
from tests.data.servers import every, http_server
from tests.support import objectives, things, tiny_config, tiny_values, write_shards


def config_with(root: Path, data: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    values = tiny_values(root)["data"]
    return tiny_config(root, data={**values, **(data or {})}, **sections)


def built(config: RunConfig) -> Modalities:
    return build_modalities(config.modalities, config.data.tokenizer)


@pytest.fixture(scope="module")
def config(tiny_data: Path) -> RunConfig:
    modalities = tiny_values(tiny_data)["modalities"]
    modalities["text"]["dropout"] = 0.2
    return config_with(tiny_data, modalities=modalities)


@pytest.fixture(scope="module")
def modalities(config: RunConfig) -> Modalities:
    return built(config)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert_same(value, b[name])
    elif isinstance(a, Batch | AttentionBlocks | Targets):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def batches(steps: Iterable[StepData]) -> list[tuple[int, list[Batch]]]:
    return [(data.step, data.microbatches) for data in steps]


def test_ranks_whose_shards_have_as_many_samples_of_other_sizes_have_another_digest(
    tiny_data: Path, tmp_path: Path, modalities: Modalities
) -> None:
    digests = []
    for name, lacking in (("a", ()), ("b", ()), ("c", ("audio",))):
        write_shards(tmp_path / name / "train", things(16), lacking)
        config = config_with(tmp_path / name, {"tokenizer": str(tiny_data / "tokens.model")})
        digests.append(Loader(config, modalities).digest())
    assert digests[0] == digests[1] != digests[2]


def test_a_batch_that_does_not_divide_is_refused_with_one_that_does(config: RunConfig) -> None:
    assert microbatch_size(config, 2) == 4  # 16 over 2 microbatches and 2 ranks
    with pytest.raises(ValueError, match=r"16 does not divide into train.num_microbatches 2 x 3 .* use e.g. 18"):
        microbatch_size(config, 3)


def test_a_bad_sample_keeps_its_slot_and_is_counted(tiny_data: Path, tmp_path: Path, modalities: Modalities) -> None:
    write_shards(tmp_path / "train", things(48), corrupt=("thing-000",))
    config = config_with(tmp_path, {"num_workers": 2, "tokenizer": str(tiny_data / "tokens.model")})
    steps = list(Loader(config, modalities, stop_step=3))
    assert sum(data.stats.samples for data in steps) == 48
    bad = [item for data in steps for item in data.stats.bad]
    assert [item.key for item in bad] == ["thing-000"]
    assert "image cannot be decoded" in bad[0].reason
    for data in steps:
        for part in data.microbatches:
            assert len(part.metas) == 8
            here_B = torch.stack([segment_B >= 0 for segment_B in part.pooled.values()]).any(dim=0)
            empty = [meta.key for meta, here in zip(part.metas, here_B, strict=True) if not here]
            assert empty == [meta.key for meta in part.metas if meta.key == "thing-000"]


def test_cut_texts_and_clips_and_the_seconds_of_each_stage_are_counted(tiny_data: Path) -> None:
    short = {"image": {"kind": "image", "size": 16}, "text": {"kind": "text", "max_tokens": 2},
             "audio": {"kind": "audio", "max_seconds": 0.2, "augment": False}}  # fmt: skip
    for workers in (0, 1):
        config = config_with(tiny_data, {"num_workers": workers}, modalities=short)
        stats = [data.stats for data in Loader(config, built(config), stop_step=3)]
        stages = {"read", "decode", "transform", "pack", *(["transfer"] if workers else [])}
        assert all(s.seconds.keys() == stages for s in stats)
        # every clip has 26 frames of 24, and no name has two pieces or fewer
        assert [s.cut for s in stats] == [{"audio": 16, "text": 16}] * 3


def test_the_notes_of_a_run_name_a_server_without_ranges_once(tiny_data: Path, modalities: Modalities) -> None:
    with http_server(tiny_data) as server:
        server.faults = every(1, "ignore_range")
        config = config_with(tiny_data, {"train": [{"path": f"{server.url}/train/00000.tar"}] * 2})
        with Loader(config, modalities) as loader:
            assert sum("does not answer range requests" in note for note in loader.notes) == 1


@pytest.mark.parametrize(
    ("workers", "dp_size", "cores", "message"),
    [
        (2, 1, 2, None),
        (50, 1, 2, "data.num_workers 50: the 50 data workers of this machine (1 of its ranks load) are more than its "
         "cores (2), which loads no faster and takes memory; use 2"),
        (4, 8, 16, None),  # 16 ranks on two machines, two a replica: four load here
        (5, 8, 16, "the 20 data workers of this machine (4 of its ranks load) are more than its cores (16), "),
    ],
)  # fmt: skip
def test_more_workers_than_cores_are_noted(
    workers: int, dp_size: int, cores: int, message: str | None, tiny_data: Path, modalities: Modalities,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(cores))
    for name, value in {"LOCAL_WORLD_SIZE": dp_size, "WORLD_SIZE": 2 * dp_size}.items() if dp_size > 1 else ():
        monkeypatch.setenv(name, str(value))
    config = config_with(tiny_data, {"num_workers": workers})
    with Loader(config, modalities, dp_size=dp_size) as loader:
        notes = [note for note in loader.notes if "num_workers" in note]
    assert notes == [] if message is None else message in notes[0]


def test_a_task_without_weight_is_not_packed_in_its_steps_also_after_a_resume(
    tiny_data: Path, modalities: Modalities
) -> None:
    """Captions enter at step 2; a loader that begins there, as a resumed run's does, packs the same."""
    entering = objectives({}, {"weight": [[1, 0.0], [2, 0.5]], "fraction": 1.0})
    config = config_with(tiny_data, objectives=entering)
    made = batches(Loader(config, modalities, stop_step=4))
    counts = [sum(len(batch.targets["captioning"]) for batch in parts) for _, parts in made]
    assert counts[:2] == [0, 0] and min(counts[2:]) > 0
    assert [batch.task_ids.unique().tolist() for _, parts in made for batch in parts] == [[0]] * 4 + [[0, 1]] * 4
    assert_same(batches(Loader(config, modalities, start_step=2, stop_step=4)), made[2:])


def test_evaluation_reads_every_sample_once_in_order(tiny_data: Path, tmp_path: Path, modalities: Modalities) -> None:
    rows = [{**row, "key": f"more-{i}"} for i, row in enumerate(things(5))]
    more = write_shards(tmp_path / "more", rows)
    config = config_with(tiny_data)
    parts = list(iterate_eval([tiny_data / "train", more], config, modalities, batch_size=20))
    keys = [sample.meta.key for _, samples in parts for sample in samples]
    assert keys == [f"thing-{i:03d}" for i in range(48)] + [f"more-{i}" for i in range(5)]
    assert [len(samples) for _, samples in parts] == [20, 20, 13]
    for batch, samples in parts:
        assert batch.metas == tuple(sample.meta for sample in samples)
        assert int((batch.task_ids == 1).sum()) == len(samples)  # every one has a caption


def test_texts_alone_make_batches(config: RunConfig, modalities: Modalities) -> None:
    texts = ["red", "green number 1", " "]
    parts = list(text_batches(texts, "text", config, modalities, batch_size=2))
    pooled = [{name: (segment_B >= 0).tolist() for name, segment_B in part.pooled.items()} for part in parts]
    assert pooled == [
        {"image": [False] * 2, "audio": [False] * 2, "text": [True] * 2},
        {"image": [False], "audio": [False], "text": [False]},
    ]
