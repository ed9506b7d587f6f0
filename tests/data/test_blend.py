"""The blend of a run: weights by sample and token, schedules, temperature, parts, epochs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.order.blend import Blend, build_stages
from mmmoe_pretrain.data.order.fields import field_path, measure_field, read_field
from mmmoe_pretrain.data.order.mix import Stage
from mmmoe_pretrain.data.sources.source import open_indexed
from mmmoe_pretrain.data.sources.stream import Stream
from mmmoe_pretrain.data.storage.files import Files
from mmmoe_pretrain.modalities import Modalities, default_modalities
from tests.support import things, tiny_config, tiny_values, write_shards

BATCH = 16


@dataclass
class Shards:
    """An indexed source of ``sizes`` samples, of which ``kinds`` give the extensions of one after the other."""

    sizes: tuple[int, ...]
    kinds: tuple[tuple[str, ...], ...] = (("png", "txt"),)
    modalities: Modalities = field(default_factory=default_modalities)

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def shard_sizes(self) -> np.ndarray:
        return np.asarray(self.sizes)

    @property
    def contents(self) -> dict[tuple[str, ...], int]:
        return {kind: len(self.with_contents(kind)) for kind in self.kinds}

    def with_contents(self, extensions: tuple[str, ...]) -> np.ndarray:
        return np.arange(self.kinds.index(extensions), len(self), len(self.kinds))


def config_of(*sources: dict[str, Any], steps: int = 20, **data: Any) -> RunConfig:
    root = Path("nowhere")
    train = [{"path": f"source-{n}", **source} for n, source in enumerate(sources)]
    values = tiny_values(root)
    return tiny_config(
        root,
        data={**values["data"], "train": train, **data},
        train={**values["train"], "global_batch_size": BATCH, "steps": steps},
    )


def drawn(blend: Blend, steps: int, first: int = 0) -> Counter[int]:
    places = blend.at(np.arange(first * BATCH, (first + steps) * BATCH))
    return Counter(places.source.tolist())


def test_weights_are_shares_of_the_samples_or_of_the_tokens() -> None:
    sources = [Shards((50, 50)), Shards((30,))]
    config = config_of({"weight": 3}, {"weight": 1})
    assert drawn(Blend(config, sources), steps=16) == {0: 192, 1: 64}
    # samples of 30 and of 10 tokens: equal shares of tokens are a sample to three
    by_tokens = Blend(config_of({}, {}, weigh_by="tokens"), sources, lambda source, _: (30.0, 10.0)[source])
    assert drawn(by_tokens, steps=16) == {0: 64, 1: 192}


def test_temperature_flattens_the_shares_of_sizes() -> None:
    sources = [Shards((160,)), Shards((10,))]
    assert drawn(Blend(config_of({}, {}, temperature=1.0), sources), steps=17) == {0: 256, 1: 16}
    assert drawn(Blend(config_of({}, {}, temperature=2.0), sources), steps=5) == {0: 64, 1: 16}
    assert drawn(Blend(config_of({}, {"weight": 4}, temperature=2.0), sources), steps=2) == {0: 16, 1: 16}


def test_a_schedule_moves_the_shares_in_steps_along_its_lines() -> None:
    config = config_of({"weight": [[0, 1.0], [256, 0.0]]}, {"weight": [[0, 0.0], [256, 1.0]]}, steps=500)
    blend = Blend(config, [Shards((50,)), Shards((50,))])
    shares = [drawn(blend, 32, first)[1] / (32 * BATCH) for first in range(0, 256, 32)]
    assert shares == [(2 * n + 1) / 16 for n in range(8)]  # of the line at the middle of 32 steps: 1/16, 3/16, ...
    assert drawn(blend, 20, first=256) == {1: 20 * BATCH}


def test_parts_by_modalities_have_shares_of_their_own_and_every_sample_once_an_epoch() -> None:
    kinds = (("png", "txt"), ("txt",), ("jpg", "txt"), ("png", "txt", "json"))  # a quarter is text alone
    source = Shards((448, 448), kinds)
    blend = Blend(config_of({"split_by": "modalities", "temperature": 1e9}), [source])
    places = blend.at(np.arange(600))
    alone = places.index % 4 == 1
    assert abs(alone.sum() - 300) <= BATCH  # half of the samples; a block of 2 in each of 16 lanes
    natural = Blend(config_of({"split_by": "modalities"}), [source]).at(np.arange(896))
    assert sorted(natural.index.tolist()) == list(range(896))  # 14 blocks of 3 + 1 in 16 lanes


def test_after_its_epochs_the_share_of_a_source_goes_to_the_others() -> None:
    # 64 samples, twice: 128 of the first 256
    blend = Blend(config_of({"epochs": 2}, {}), [Shards((64,)), Shards((1000,))])
    assert blend.steps is None
    places = blend.at(np.arange(40 * BATCH))
    mine = places.index[places.source == 0]
    assert Counter(mine.tolist()) == dict.fromkeys(range(64), 2)
    assert np.flatnonzero(places.source == 0).max() < 256


@given(
    weights=st.lists(st.floats(0.1, 1), min_size=2, max_size=4),
    sizes=st.lists(st.integers(20, 400), min_size=4, max_size=4),
    epochs=st.lists(st.integers(1, 3), min_size=1, max_size=3),
)
@example(weights=[0.617, 1.0], sizes=[200, 240, 20, 20], epochs=[2])
@settings(max_examples=30, deadline=None)
def test_a_source_has_its_share_until_its_epochs_end(
    weights: list[float], sizes: list[int], epochs: list[int]
) -> None:
    ending = epochs[: len(weights) - 1]
    values = [{"weight": weight} for weight in weights]
    values = [{**value, "epochs": n} for value, n in zip(values, ending, strict=False)] + values[len(ending) :]
    blend = Blend(config_of(*values), [Shards((size,)) for size in sizes[: len(weights)]])
    shares = np.asarray(weights) / sum(weights)
    ideal = min(-(-size * n // BATCH) / share for size, n, share in zip(sizes, ending, shares, strict=False))
    rows = int(4 * sum(size * n / BATCH for size, n in zip(sizes, ending, strict=False)) / shares.min()) + 50
    places = blend.at(np.arange(rows * BATCH))
    drawn = places.source.reshape(rows, BATCH)
    ends = [int(np.flatnonzero((drawn == n).any(axis=1)).max()) + 1 for n in range(len(ending))]
    assert abs(min(ends) - ideal) <= 4, "of the first, in rows"
    window = min(32, *ends)
    for first in range(0, min(ends) - window + 1, 8):
        found = np.bincount(drawn[first : first + window].ravel(), minlength=len(weights)) / (window * BATCH)
        # 5 standard deviations of a random order, and 2 samples of a lane by rounding
        assert (np.abs(found - shares) <= 2.5 / np.sqrt(window * BATCH) + 2 / window).all()
    for n, (size, times) in enumerate(zip(sizes, ending, strict=False)):
        given = Counter(places.index[places.source == n].tolist())
        assert set(given.values()) <= {times, times + 1} and len(given) == size
        assert given.total() == -(-size * times // BATCH) * BATCH


def test_a_short_schedule_is_followed_and_ends_at_its_step() -> None:
    config = config_of({"weight": [[0, 3.0], [40, 0.5]]}, {}, {})
    blend = Blend(config, [Shards((240,))] * 3)
    given = 0
    for first in range(0, 40, 8):
        weight = 3 - 2.5 * (first + 4) / 40
        given += drawn(blend, 8, first)[0] / BATCH - 8 * weight / (weight + 2)
        assert abs(given) <= 1  # in samples of a lane: what a stage rounds away comes in the next one
    assert drawn(blend, 50, first=40)[0] == 50 * BATCH // 5 and not blend.notes
    to_zero = Blend(config_of({"weight": [[0, 1.0], [30, 0.0]]}, {}, {}), [Shards((240,))] * 3)
    assert drawn(to_zero, 10, first=20)[0] > 0 and not drawn(to_zero, 50, first=30)[0]
    assert "takes 30 steps: it is followed in stages of 10 steps, with shares rounded to 1/10" in to_zero.notes[0]


def test_a_source_of_a_small_share_is_drawn_throughout_a_schedule() -> None:
    # 1% of 640 rows, in stages of 20 that hold 0.2 of its samples each
    changing = {"weight": [[0, 0.6], [640, 0.4]]}
    blend = Blend(config_of(changing, {"weight": 0.49}, {"weight": 0.01}), [Shards((9,))] * 3)
    for first, total in ((0, 1.05), (320, 0.95)):  # of the weights in the middle of each half
        found = drawn(blend, 320, first)
        assert abs(found[2] / BATCH - 3.2 / total) <= 2
        assert abs(found[1] / BATCH - 320 * 0.49 / total) <= 4
    assert sum(stage.block * (stage.blocks or 0) for stage in blend.stages) == 640


def test_a_run_beyond_the_end_of_its_data_is_refused_with_the_steps_there_are() -> None:
    sources = [Shards((60,)), Shards((37,))]
    # 60 and 37 samples over 16 lanes: 4 + 3 rows, of which the last of each repeats a few
    blend = Blend(config_of({"epochs": 1}, {"epochs": 1}, steps=7), sources)
    assert blend.steps == 7
    places = blend.at(np.arange(7 * BATCH))
    for source, size in enumerate((60, 37)):
        assert set(places.index[(places.source == source) & (places.epoch == 0)].tolist()) == set(range(size))
    with pytest.raises(ValueError, match=r"ends after 7 steps of 16 samples, .* train.steps is 8"):
        Blend(config_of({"epochs": 1}, {"epochs": 1}, steps=8), sources)


@given(
    weights=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=1, max_size=4),
    ends=st.lists(st.none() | st.integers(1, 50), min_size=3, max_size=3),
)
@settings(max_examples=60, deadline=None)
def test_stages_never_give_a_part_more_than_it_has(weights: list[list[int]], ends: list[int | None]) -> None:
    plan = [(25 * n, [float(weight) for weight in its]) for n, its in enumerate(weights)]
    try:
        stages = build_stages(plan, ends, lanes=4)
    except ValueError as error:
        assert "every source has weight 0" in str(error)
        return
    assert all(stage.blocks for stage in stages[:-1])
    for part, end in enumerate(ends):
        given = sum((stage.blocks or 0) * stage.counts[part] for stage in stages)
        if end is not None:
            assert given <= end
            assert stages[-1].blocks is not None or stages[-1].counts[part] == 0
            assert given == end or not weights[-1][part]  # one with a weight to the end is used up


def test_a_last_part_of_a_block_comes_in_a_block_of_its_own() -> None:
    assert build_stages([(0, [2.0, 1.0])], [5, None], lanes=1) == [
        Stage((2, 1), 2),
        Stage((1, 1), 1),
        Stage((0, 1)),
    ]


def test_streams_keep_their_weights_and_refuse_what_needs_a_size() -> None:
    sources = [Shards((50,)), Stream([f"pipe:cat {n}.tar" for n in range(9)], Files(), default_modalities())]
    blend = Blend(config_of({"weight": 1}, {"weight": 3}), sources)
    places = blend.at(np.arange(8 * BATCH))
    streamed = places.source == 1
    assert streamed.sum() == 96
    assert set(places.sub_lane[streamed].tolist()) == set(range(8))  # the most that divide 16 lanes
    for data in ({"temperature": 2.0}, {"weigh_by": "tokens"}):
        with pytest.raises(ValueError, match="source-1 is only read on"):
            Blend(config_of({}, {}, **data), sources, lambda *_: 1.0)
    with pytest.raises(ValueError, match="source-1 is only read on"):
        Blend(config_of({}, {"epochs": 2}), sources)


def test_lanes_are_those_of_a_batch_and_data_smaller_than_a_batch_is_noted() -> None:
    assert Blend(config_of({}), [Shards((500,))]).lanes == BATCH
    assert Blend(config_of({}, lanes=4), [Shards((500,))]).lanes == 4
    assert Blend(config_of({}), [Shards((500,))]).notes == []
    (note,) = Blend(config_of({}), [Shards((10,))]).notes
    assert "global_batch_size 16 exceeds the 10 samples" in note


@pytest.mark.parametrize("source, message", [
    ({"weight": 0}, "source-0 has weight 0"),
    ({"weight": [[5, 1.0], [2, 0.5]]}, "rising steps"),
    ({"weight": -1}, "from 0 on"),
    ({"temperature": 2}, "split_by: modalities"),
])  # fmt: skip
def test_settings_without_a_meaning_are_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(source)


def test_a_weight_that_would_never_be_drawn_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"1e-09 of 1, would get less than one .* in 4,096; .* raise the temperature"
    ):
        Blend(config_of({}, {"weight": 1e-9}), [Shards((9,)), Shards((9,))])


def test_parts_by_a_field_of_the_json_are_those_that_the_index_command_has_read(tmp_path: Path) -> None:
    rows = [{**row, "language": "de" if i % 4 == 0 else "en"} for i, row in enumerate(things(64))]
    folder = open_indexed(write_shards(tmp_path / "train", rows))
    config = config_of({"path": str(tmp_path / "train"), "split_by": "language", "temperature": 1e9})
    with pytest.raises(
        ValueError, match=r"were not read yet; run mmmoe-data index CONFIG with this run's config and"
    ):
        Blend(config, [folder])
    for name, hint in {"langage": r"did you mean language\?", "xyz": "the fields with texts are .*language"}.items():
        with pytest.raises(ValueError, match=f"no sample of .*train has a text in the field {name} .*: {hint}"):
            measure_field(folder, name)
        with pytest.raises(ValueError, match=hint):
            Blend(config_of({"path": str(tmp_path / "train"), "split_by": name}), [folder])
        nothing = {"values": np.asarray([""]), "ids": np.zeros(64, np.uint16), "bytes": folder.shard_bytes}
        np.savez(field_path(folder, name), **nothing)
        assert read_field(folder, name) is None  # of an earlier version
    numbered = open_indexed(write_shards(tmp_path / "numbered", [{**row, "language": 3} for row in things(2)]))
    assert measure_field(numbered, "language")[0] == ["3"]
    measure_field(folder, "language")
    blend = Blend(config, [folder])
    places = blend.at(np.arange(32))
    assert int((places.index % 4 == 0).sum()) == 16  # half of them, though only a quarter is German
    assert blend.digest() == Blend(config, [folder]).digest()
    with np.load(field_path(folder, "language")) as file:
        np.savez(field_path(folder, "other"), **{**file, "bytes": folder.shard_bytes + 512})
    assert read_field(folder, "other") is None  # of shards that were replaced by as many samples
    field_path(folder, "language").write_bytes(b"damaged")
    assert read_field(folder, "language") is None


def test_ranks_with_other_shards_have_another_digest() -> None:
    digests = [Blend(config_of({}), [Shards(sizes)]).digest() for sizes in ((50, 50), (50, 51), (100,))]
    assert len(set(digests)) == 3


@pytest.mark.parametrize("changed, same_until, differs_at", [
    ([{"weight": 3.0001}, {}], 10**6, None),  # rounded to the same shares
    ([{"weight": [[0, 3], [100, 3], [200, 1]]}, {}], 100, 200),  # a change to come
    ([{"weight": 3, "epochs": 90}, {}], 40, 10**6),  # 90 x 60 samples end in step 450
    ([{"weight": 2}, {}], 0, 1),
])  # fmt: skip
def test_the_digest_of_some_batches_is_that_of_what_they_depend_on(
    changed: list[dict[str, Any]], same_until: int, differs_at: int | None
) -> None:
    sources = [Shards((60,)), Shards((37,))]
    before = Blend(config_of({"weight": 3}, {}), sources)
    after = Blend(config_of(*changed), sources)
    assert before.digest(same_until) == after.digest(same_until)
    assert drawn(before, same_until % 1000) == drawn(after, same_until % 1000)
    assert differs_at is None or before.digest(differs_at) != after.digest(differs_at)
    assert before.digest(5) != Blend(config_of({"weight": 3}, {}), [Shards((60,)), Shards((38,))]).digest(5)
