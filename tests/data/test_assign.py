"""Expected lengths, and what each rank reads by them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmmoe_pretrain.config import RunConfig, dump
from mmmoe_pretrain.data.decode import Draws, decode
from mmmoe_pretrain.data.order import lengths
from mmmoe_pretrain.data.order.assign import Assignment, estimate_all
from mmmoe_pretrain.data.order.lengths import Line, fit, lengths_path, measure_lengths
from mmmoe_pretrain.data.pack import PackSettings, pack
from mmmoe_pretrain.data.sources.source import Indexed, open_indexed
from mmmoe_pretrain.data_prep import index
from mmmoe_pretrain.modalities import Modalities, build_modalities
from tests.support import objectives, things, tiny_config, tiny_values, write_shards, write_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples with an image, a clip and a text of 3 to 30 words each."""
    root = tmp_path_factory.mktemp("lengths")
    rows = [{**row, "name": " ".join([row["name"]] * (1 + i * 7 % 10))} for i, row in enumerate(things(64))]
    write_shards(root / "train", rows)
    write_tokenizer(root / "tokens.model")
    return root


@pytest.fixture
def config(root: Path) -> RunConfig:
    values = tiny_values(root)
    values["modalities"]["text"]["max_tokens"] = 100
    return tiny_config(root, modalities=values["modalities"], objectives=objectives(captioning={"fraction": 1.0}))


@pytest.fixture
def parts(config: RunConfig) -> tuple[Indexed, Modalities, PackSettings]:
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    folder = open_indexed(config.data.train[0].path, modalities=modalities)
    return folder, modalities, PackSettings.from_config(config, modalities)


def packed_rows(i: int, parts: tuple[Indexed, Modalities, PackSettings]) -> int:
    folder, modalities, settings = parts
    sample: Any = decode(folder.read(i), modalities)
    return int(pack([sample], settings).valid.sum())


def test_a_line_is_fitted_and_kept_within_what_occurs() -> None:
    line = fit([10, 20, 30], [5, 7, 9], most=11)
    assert line == Line(3.0, 0.2, 1.0, 11.0)
    assert line.at(np.asarray([0, 35, 1000])).tolist() == [3.0, 10.0, 11.0]
    assert fit([10, 20], [4, 4], most=11).at(np.asarray([500])).tolist() == [4.0]
    assert fit([0, 0], [4, 5], most=11).at(np.asarray([0])).tolist() == [4.5]


def test_expected_tokens_are_near_the_rows_of_the_stream_and_measured_ones_nearer(
    config: RunConfig, parts: tuple[Indexed, Modalities, PackSettings]
) -> None:
    folder, modalities, _ = parts
    rows = np.asarray([packed_rows(i, parts) for i in range(len(folder))])
    path = lengths_path(folder, modalities)
    positions = np.arange(64)
    places = Assignment(config, [folder], modalities, 2).blend.at(positions)
    error = {}
    for measured in (False, True):
        if measured:
            measure_lengths(folder, modalities, path)
        found = Assignment(config, [folder], modalities, 2).expected_rows(positions, places)
        error[measured] = np.abs(found / rows[places.index] - 1).mean()
    path.unlink()
    # the objective draws an image or a clip beside the text: even known lengths leave that open
    assert error[True] < error[False] < 0.15
    assert error[True] < 0.1


def test_the_draws_of_masked_modelling_are_known_from_lengths_alone(root: Path) -> None:
    """Which samples take part; the tokens that they hide are of contents, which are not read."""
    hidden = {"image": 0.5, "audio": 0.5, "text": 0.5}
    config = tiny_config(root, objectives={"masked": {"kind": "masked", "hidden": hidden, "fraction": 0.5}})
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    folder = open_indexed(config.data.train[0].path, modalities=modalities)
    settings = PackSettings.from_config(config, modalities)
    path = lengths_path(folder, modalities)
    measure_lengths(folder, modalities, path)
    positions = np.arange(64)
    assignment = Assignment(config, [folder], modalities, 2)
    path.unlink()
    places = assignment.blend.at(positions)
    rows = []
    for position, i in zip(positions.tolist(), places.index.tolist(), strict=True):
        sample: Any = decode(folder.read(i), modalities)
        rows.append(int(pack([sample], settings, [position]).valid.sum()))
    assert 16 < rows.count(0) < 48
    assert assignment.expected_rows(positions, places).tolist() == rows


def test_modalities_that_samples_lose_are_not_in_the_rows_that_are_expected(root: Path) -> None:
    values = tiny_values(root)
    values["modalities"]["image"] |= {"dropout_share": [[0, 0.0], [2, 0.6]]}
    values["modalities"]["audio"] |= {"withheld_share": 0.5}
    config = tiny_config(root, modalities=values["modalities"], objectives=objectives(captioning=None))
    modalities = build_modalities(config.modalities, config.data.tokenizer)
    folder, settings = (
        open_indexed(str(root / "train"), modalities=modalities),
        PackSettings.from_config(config, modalities),
    )
    positions = np.arange(64)  # of four steps
    path = lengths_path(folder, modalities)
    measure_lengths(folder, modalities, path)
    assignment = Assignment(config, [folder], modalities, 2)
    path.unlink()
    places = assignment.blend.at(positions)
    rows = []
    for position, i in zip(positions.tolist(), places.index.tolist(), strict=True):
        sample: Any = decode(folder.read(i), modalities, Draws(config.seed, position, position // 16))
        rows.append(int(pack([sample], settings, [position]).valid.sum()))
    # a clip that plays faster or slower has a token less or more
    np.testing.assert_allclose(assignment.expected_rows(positions, places), rows, atol=1)


def test_a_rank_without_the_lengths_of_rank_0_is_refused(
    config: RunConfig, parts: tuple[Indexed, Modalities, PackSettings]
) -> None:
    folder, modalities, _ = parts
    (known,) = estimate_all(config, [folder], modalities)
    assert known is not None
    other = (dataclasses.replace(known, measured="0123"),)
    with pytest.raises(ValueError, match=r"rank 0 has lengths of .* put them where all machines read them"):
        Assignment(config, [folder], modalities, 2, other)


def test_damaged_or_foreign_lengths_are_not_used(
    tmp_path: Path, parts: tuple[Indexed, Modalities, PackSettings]
) -> None:
    folder, modalities, _ = parts
    path = tmp_path / "lengths.npy"
    assert lengths.open_lengths(path, folder, modalities) is None
    measure_lengths(folder, modalities, path)
    exact = lengths.open_lengths(path, folder, modalities)
    assert exact is not None and exact.shape == (64, 3)
    np.save(path, np.zeros((63, 3), dtype=np.uint32))
    assert lengths.open_lengths(path, folder, modalities) is None
    path.write_bytes(b"not an array")
    assert lengths.open_lengths(path, folder, modalities) is None


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_read_level_tokens_of_the_same_global_microbatch(
    config: RunConfig, parts: tuple[Indexed, Modalities, PackSettings], ranks: int
) -> None:
    folder, modalities, _ = parts
    config = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": 64})})
    each = 32 // ranks  # two microbatches
    spread = {}
    for on in (False, True):
        data = config.data.model_copy(update={"level_tokens": on})
        assignment = Assignment(config.model_copy(update={"data": data}), [folder], modalities, ranks)
        assignment_of_all = [assignment.of_rank(5, rank) for rank in range(ranks)]
        positions = np.concatenate([share.positions for share in assignment_of_all])
        assert sorted(positions.tolist()) == list(range(5 * 32, 6 * 32))
        assert all(len(share.positions) == each for share in assignment_of_all)
        for share in assignment_of_all:
            np.testing.assert_array_equal(share.places.index, assignment.blend.at(share.positions).index)
        load = np.asarray([sum(packed_rows(i, parts) for i in share.places.index) for share in assignment_of_all])
        spread[on] = load.max() / load.mean()
    assert spread[True] < spread[False]


def test_the_index_of_a_config_has_the_lengths_of_its_samples(
    tmp_path: Path, config: RunConfig, parts: tuple[Indexed, Modalities, PackSettings]
) -> None:
    folder, modalities, _ = parts
    dump(config, tmp_path / "run.yaml")
    index.run([str(tmp_path / "run.yaml")], workers=1, lengths=True)
    path = lengths_path(folder, modalities)
    exact = lengths.open_lengths(path, folder, modalities)
    path.unlink()
    assert exact is not None
    for i in (0, 63):
        sample: Any = decode(folder.read(i), modalities)
        assert exact[i].tolist() == [modalities[item.modality].num_tokens(item.value) for item in sample.items]
