"""Which settings may change between two starts of a run, and resuming a run whose folder was moved."""

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain.checkpoint import load_model
from mmmoe_pretrain.checkpoint.model import TOKENIZER
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.sources.survey import changes, read_sizes
from mmmoe_pretrain.evaluate.rows import open_rows
from mmmoe_pretrain.export.write import export_run
from mmmoe_pretrain.surgery.operation import operate
from mmmoe_pretrain.surgery.split import split
from mmmoe_pretrain.train import start
from mmmoe_pretrain.train.loop import train
from mmmoe_pretrain.train.start import check_same_model, config_to_train, differences
from tests.distributed import run_ranks
from tests.export.support import make_run
from tests.support import objectives, tiny_config, tiny_values
from tests.train.faulty import config_in, steps_of

MOE = {"num_experts": 4, "expert_hidden_size": 8}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    run_config.dump(tiny_config(tmp_path, moe={**MOE, "layers": {1: {"num_experts": 8}}}), path)
    return path


def test_how_an_moe_layer_is_computed_and_its_losses_may_change_but_not_its_experts(
    tmp_path: Path, saved: Path
) -> None:
    computed = {"lending": {}, "losses": {"z": 0.1},
                "layers": {1: {"num_experts": 8, "expert_backend": "grouped_mm"}}}  # fmt: skip
    check_same_model(tiny_config(tmp_path, moe={**MOE, **computed}), saved)
    check_same_model(tiny_config(tmp_path, moe={**MOE, **computed, "lending": None, "dispatch_chunks": 3}), saved)
    with pytest.raises(ValueError, match=r"moe.layers.1.num_experts was 8 and is 16"):
        check_same_model(tiny_config(tmp_path, moe={**MOE, "layers": {1: {"num_experts": 16}}}), saved)


def test_classes_keep_their_order_and_their_representation(tmp_path: Path) -> None:
    """The head's weights have the same shape for another order, and another meaning."""

    def config(**changed: object) -> RunConfig:
        colour = {"kind": "classify", "of": "image", "classes": ["red", "blue"], **changed}
        return tiny_config(tmp_path, objectives=objectives() | {"colour": colour})

    run_config.dump(config(), tmp_path / "config.yaml")
    check_same_model(config(label_smoothing=0.1), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"predicted.classes.colour.names was 'red, blue' and is 'blue, red'"):
        check_same_model(config(classes=["blue", "red"]), tmp_path / "config.yaml")
    with pytest.raises(ValueError, match=r"predicted.classes.colour.of was 'image' and is 'text'"):
        check_same_model(config(of="text"), tmp_path / "config.yaml")


def test_a_config_that_an_earlier_version_saved_without_a_vocabulary_size_is_the_same_model(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    values = config.model_dump(mode="json")
    del values["model"]["vocab_size"]
    run_config.dump(run_config.parse(values), tmp_path / "config.yaml")
    check_same_model(config, tmp_path / "config.yaml")


def test_an_added_modality_or_objective_is_named_as_a_whole(tmp_path: Path, saved: Path) -> None:
    values = tiny_values(tmp_path, moe={**MOE, "layers": {1: {"num_experts": 8}}})
    values["modalities"]["motion"] = {"kind": "series", "channels": 3}
    values["objectives"] = {"contrastive": values["objectives"]["contrastive"], "pages": {"kind": "next_token"}}
    told = "modalities.motion is new; objectives.captioning is missing; objectives.pages is new; set it back"
    with pytest.raises(ValueError, match=told):
        check_same_model(run_config.parse(values), saved)


def test_the_decoder_of_hidden_tokens_cannot_change(tmp_path: Path) -> None:
    saved, change = tmp_path / "config.yaml", "cannot change the model .*predicted.decoders.masked"

    def config(**more: Any) -> RunConfig:
        masked = {"kind": "masked", "hidden": {"image": 0.5, "audio": 0.5}, "decoder_layers": 1, **more}
        return tiny_config(tmp_path, objectives={**objectives(), "masked": masked})

    run_config.dump(config(), saved)
    check_same_model(config(hidden={"image": 0.7, "audio": 0.1}, weight=0.5), saved)
    with pytest.raises(ValueError, match=rf"{change}.layers was 1 and is 2; set it back"):
        check_same_model(config(decoder_layers=2), saved)
    with pytest.raises(ValueError, match=rf"{change} is missing"):
        check_same_model(config(decoder_layers=0), saved)
    with pytest.raises(ValueError, match=rf"{change}.contents was \['audio', 'image'\] and is \['image'\]"):
        check_same_model(config(hidden={"image": 0.5}, parts=["image", "audio"]), saved)


def test_a_memory_queue_of_another_size_is_refused(tmp_path: Path, saved: Path) -> None:
    config = tiny_config(
        tmp_path, moe={**MOE, "layers": {1: {"num_experts": 8}}}, objectives=objectives({"queue_size": 16})
    )
    with pytest.raises(ValueError, match=r"objectives.contrastive .* is .*'queue_rows \(16, 3, 8\)'"):
        check_same_model(config, saved)


def test_changed_sources_are_named_by_their_paths() -> None:
    a, b = {"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0}
    assert list(differences({"train": [a]}, {"train": [b]}, "data.")) == ["data.train[0].path was 'a' and is 'b'"]
    assert list(differences({"train": [a, b]}, {"train": [b]}, "data.")) == ["data.train was a, b and is b"]
    assert list(differences({"train": [a]}, {"train": [a]})) == []


@pytest.mark.parametrize("before, now, told", [
    ([("a", 240), ("b", 9)], [("a", 180), ("b", 9)], ["a: 240 -> 180 samples"]),
    ([("a", 240)], [("new", 180)], ["new: 240 -> 180 samples"]),
    ([("a", 240), ("b", 9)], [("b", 9)], ["a is missing"]),
    ([("b", 9)], [("a", 240), ("b", 9)], ["a is new"]),
    ([("a", 240), ("b", 9)], [("b", 9), ("c", 5)], ["a is missing", "c is new"]),
    ([], [("a", 240)], []),  # of a checkpoint that has no sizes
])  # fmt: skip
def test_changed_shards_are_named_by_source(before: Any, now: Any, told: list[str]) -> None:
    old, new = ([(path, {"samples": count}) for path, count in each] for each in (before, now))
    assert changes(read_sizes(json.loads(json.dumps(old))), new) == told
    assert read_sizes([["a"]]) == read_sizes(None) == read_sizes([["a", {"samples": "many"}]]) == []


def trained(config: RunConfig) -> list[str]:
    """What the log warns of."""
    message: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: message.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mmmoe_pretrain").addHandler(handler)
    assert train(config) == 0
    return message


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_a_moved_run_resumes_in_its_new_place_with_its_own_tokenizer(
    tmp_path: Path, tiny_data: Path, umask: int
) -> None:
    """Four steps of a cosine from 3e-3 to 1e-5 that eight steps stretch: step 5 has half of it, 0.0015."""
    tokens = str(shutil.copy(tiny_data / "tokens.model", tmp_path / "tokens.model"))
    optimizer = {"learning_rate": 3e-3, "warmup_steps": 0}
    shard = shutil.copytree(tiny_data / "train", tmp_path / "train") / "00000.tar"
    data = {"tokenizer": tokens, "train": [{"path": str(tmp_path / "train")}]}
    config = config_in(tmp_path, tiny_data, data=data, train={"steps": 4}, optimizer=optimizer)
    assert run_ranks(1, trained, config) == [[]]
    moved = tmp_path / "else" / "renamed"
    moved.parent.mkdir()
    shutil.move(config.run_dir, moved)
    Path(tokens).rename(tmp_path / "lost.model")
    shutil.copy(shard, tmp_path / "train" / "00001.tar")

    again = config_to_train(moved / "config.yaml", ["train.steps=8", "seed=7", "data.lanes=1"])
    assert (again.run_dir, again.data.tokenizer) == (moved, str(moved / TOKENIZER))
    ((lanes, order, rate, shards),) = run_ranks(1, trained, again)
    assert "data.lanes was None and is 1: the order of the data changes" in lanes
    assert f"seed was {config.seed} and is 7: the order of the data changes" in order
    assert "the learning rate of step 5 is 0.0015" in rate
    told = rf"not what .* was trained on: .* \({tmp_path / 'train'}: 1 -> 2 shards, (\d+) -> (\d+) samples, \d+,"
    before, after = re.search(told, shards).groups()
    assert int(after) == 2 * int(before)
    assert steps_of(again) == list(range(1, 9))
    assert not config.run_dir.exists()

    export_run(moved, tmp_path / "out")
    operate(moved, tmp_path / "finer", [], "split", lambda source: split(source, 2, False))
    for folder in (moved, tmp_path / "out", tmp_path / "finer"):
        assert (folder / TOKENIZER).read_bytes() == (tmp_path / "lost.model").read_bytes()
        for path in (path for path in folder.rglob("*") if path.is_file()):
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path
    assert config_to_train(tmp_path / "finer" / "config.yaml").data.tokenizer == str(tmp_path / "finer" / TOKENIZER)


def test_a_copy_of_the_tokenizer_that_is_damaged_is_named_and_another_can_be_given(
    tmp_path: Path, tiny_data: Path
) -> None:
    config, _ = make_run(tmp_path, tiny_data)
    shutil.copy(config.data.tokenizer, config.run_dir / TOKENIZER)
    test = [str(tiny_data / "train")]
    assert open_rows(config.run_dir, load_model(config.run_dir)[1], test).modalities.vocab_size == 48
    copy = config.run_dir / TOKENIZER
    copy.write_bytes(copy.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=rf"tokenizer {copy} has fingerprint .* set data.tokenizer"):
        open_rows(config.run_dir, load_model(config.run_dir)[1], test)
    other = [f"data.tokenizer={tiny_data / 'tokens.model'}"]
    assert open_rows(config.run_dir, load_model(config.run_dir, other)[1], test).modalities.vocab_size == 48
    export_run(config.run_dir, tmp_path / "out", overrides=other)
    assert (tmp_path / "out" / TOKENIZER).read_bytes() == (tiny_data / "tokens.model").read_bytes()


def run_folder(config: RunConfig, folder: Path) -> Path:
    """The config.yaml of a run in ``folder``, as far as a config is looked at."""
    folder.mkdir(parents=True)
    (folder / "events.jsonl").touch()
    run_config.dump(config, folder / "config.yaml")
    return folder / "config.yaml"


def test_another_name_or_place_on_the_command_line_is_another_run(tmp_path: Path) -> None:
    path = run_folder(tiny_config(tmp_path), tmp_path / "moved")
    assert config_to_train(path).run_dir == tmp_path / "moved"
    assert config_to_train(path, ["name=other"]).run_dir == tmp_path / "runs" / "other"
    assert config_to_train(path, [f"runs_dir={tmp_path}"]).run_dir == tmp_path / "tiny"


def test_a_run_whose_folder_has_an_illegal_name_is_refused(tmp_path: Path) -> None:
    path = run_folder(tiny_config(tmp_path), tmp_path / "tiny (copy)")
    with pytest.raises(ValueError, match=r"tiny \(copy\) is not a legal name of a run; rename"):
        config_to_train(path)
    assert config_to_train(path, ["name=other"]).name == "other"


def test_a_link_to_the_runs_and_a_config_beside_no_run_are_no_move(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    path = run_folder(config, tmp_path / "disk" / "tiny")
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    assert config_to_train(path) == config_to_train(config.run_dir / "config.yaml") == config
    (tmp_path / "disk" / "tiny" / "events.jsonl").unlink()
    (tmp_path / "runs").unlink()
    assert config_to_train(path) == config


@pytest.mark.parametrize(
    ("name", "stays", "fine"), [("tiny", False, True), ("tiny", True, False), ("x", False, False)]
)
def test_a_moved_run_whose_checkpoints_are_elsewhere_resumes_only_if_they_are_its_own(
    tmp_path: Path, name: str, stays: bool, fine: bool
) -> None:
    """They are in a folder of the run's name, which a copy would share with the run that stays."""
    config = tiny_config(tmp_path, checkpoint={"folder": str(tmp_path / "checkpoints")})
    path = run_folder(config, tmp_path / "else" / name)
    if stays:
        run_folder(config, config.run_dir)
    if fine:
        assert config_to_train(path).checkpoint_root == config.checkpoint_root
    else:
        with pytest.raises(ValueError, match=r"runs_dir=, name= and checkpoint.folder="):
            config_to_train(path)


@pytest.mark.parametrize("own", [True, False])
def test_a_run_that_is_replaced_keeps_the_tokenizer_that_it_is_to_be_trained_with(tmp_path: Path, own: bool) -> None:
    values: dict[str, Any] = {"train": [{"path": "train"}]}
    config = tiny_config(tmp_path, data={**values, "tokenizer": str(tmp_path / "tokens.model")})
    if own:  # as mmmoe import makes it
        config = tiny_config(tmp_path, data={**values, "tokenizer": str(config.run_dir / TOKENIZER)})
    run_folder(config, config.run_dir)
    (config.run_dir / TOKENIZER).touch()
    start._clear(config)
    assert [path.name for path in config.run_dir.iterdir()] == ([TOKENIZER] if own else [])
