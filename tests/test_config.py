"""Reading a run's YAML: what is refused, and with which words."""

from pathlib import Path

import pytest

from mmmoe_pretrain import config as run_config
from tests.support import tiny_values

ROOT = Path(__file__).parents[1]


def parse(**sections: object) -> run_config.RunConfig:
    return run_config.parse(tiny_values(Path("unused"), **sections))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_comes_along_is_valid(path: Path) -> None:
    assert run_config.load(path).name


@pytest.mark.parametrize("sections,message", [
    ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
    ({"moe": {"num_exprts": 4}}, "unknown key 'moe.num_exprts'; did you mean 'num_experts'?"),
    ({"moe": {"losses": {"entropy": 1}}}, "unknown key 'moe.losses.entropy'"),
    ({"data": {"train": [{"path": "a", "wieght": 1}], "tokenizer": "t"}}, "did you mean 'weight'?"),
    ({"data": {"train": []}}, "data.tokenizer: required"),
    ({"train": {"steps": 0}}, "train.steps: Input should be greater than or equal to 1 (got 0)"),
    ({"train": {"steps": "many"}}, "train.steps"),
    ({"moe": {"num_experts": 2, "experts_per_token": 4}}, "moe.experts_per_token 4 exceeds moe.num_experts 2"),
    ({"moe": {"batch_priority": True}}, "moe.capacity_factor null has none"),
    ({"moe": {"num_experts": 4, "losses": {"min_experts": {"image": 5}}}}, "min_experts of image is 5"),
    ({"model": {"hidden_size": 100, "num_heads": 8}}, "use a multiple of 16"),
    ({"modalities": {"image": {"size": 50, "patch": 16}}}, "image.size 50 is not a multiple of image.patch 16"),
    ({"modalities": {"audio": {"patch": 6}}}, "audio.patch must be a power of two, not 6"),
    ({"objectives": {"contrastive": {"weight": 0}}}, "nothing to learn"),
    ({"objectives": {"contrastive": {"pairs": {}}}}, "nothing to learn"),
    ({"objectives": {"contrastive": {"weight": 0}, "captioning": {"weight": 1, "prefixes": []}}}, "nothing to learn"),
    ({"objectives": {"captioning": {"weight": 0.5, "prefixes": []}}}, "captioning.weight 0.5 without prefixes"),
    ({"objectives": {"contrastive": {"pairs": {"image-text": -1}}}}, "greater than or equal to 0 (got -1)"),
    ({"moe": {"every": 3}}, "moe.every 3 exceeds model.num_layers 2"),
    ({"evaluate": {"prompt": "a picture of {label}"}}, "must hold {} once"),
    ({"runs_dir": None}, "runs_dir: Input should be a valid string (got None; YAML reads ~ alone as null, so"),
    ({"name": "../elsewhere"}, "name: String should match pattern"),
])  # fmt: skip
def test_bad_values_are_refused_with_the_remedy(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(**sections)
    assert message in str(caught.value)


def test_a_list_with_a_wrong_entry_is_not_called_too_short() -> None:
    assert parse(data={"train": [{"path": "a"}], "tokenizer": "t"}).data.train[0].path == "a"
    with pytest.raises(ValueError, match=r"data.train.0.path: .* NOPE is not set[^;]*;[^;]*$"):
        parse(data={"train": [{"path": "$NOPE/a"}], "tokenizer": "t"})
    with pytest.raises(ValueError, match=r"data\.train: Tuple should have at least 1 item"):
        parse(data={"train": [], "tokenizer": "t"})


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


MINIMAL = "name: a\ndata:\n  tokenizer: t\n  train:\n  - {path: p}\n"


def test_overrides_reach_into_sections_and_lists(tmp_path: Path) -> None:
    config = run_config.load(write(tmp_path, MINIMAL), ["train.steps=7", "data.train.0.weight=2.5", "moe.every=1"])
    assert (config.train.steps, config.data.train[0].weight, config.moe.every) == (7, 2.5, 1)


@pytest.mark.parametrize("override,message", [
    ("train.steps", "is not key=value"),
    ("name.steps=1", "'name' is a value"),
    ("data.train.5.weight=1", "'5' is not an index"),
    ("train.stpes=1", "did you mean 'steps'?"),
])  # fmt: skip
def test_bad_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        run_config.load(write(tmp_path, MINIMAL), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize("text,message", [("- a\n", "not a mapping"), ("a: [\n", "not valid YAML")])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_config.load(write(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no config at"):
        run_config.load(tmp_path / "none.yaml")


def test_a_dumped_config_loads_as_the_same_value(tmp_path: Path) -> None:
    config = parse()
    run_config.dump(config, tmp_path / "config.yaml")
    assert run_config.load(tmp_path / "config.yaml") == config
