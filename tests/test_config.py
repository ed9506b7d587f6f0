"""Reading a run's YAML: what is refused, and with which words."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmmoe_pretrain import config as run_config
from mmmoe_pretrain import kinds
from mmmoe_pretrain.cli import upgrade
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.config.other_names import OUR_KEYS, OURS
from mmmoe_pretrain.config.upgrade import needs_upgrade, upgraded
from tests.support import objectives, tiny_config, tiny_values

ROOT = Path(__file__).parents[1]
PAIRS = {"image-text": 1.0}


def of(name: str, **settings: Any) -> dict[str, Any]:
    """The section modalities of the tiny run with more settings of one."""
    values = tiny_values(Path("unused"))["modalities"]
    return {**values, name: {**values[name], **settings}}


def parse(**sections: object) -> run_config.RunConfig:
    return run_config.parse({**tiny_values(Path("unused")), **sections})


def fused(kind: str, *parts: str, **more: object) -> dict[str, object]:
    return {"scene": {"kind": kind, "parts": list(parts), **more}}


def test_a_list_of_modalities_is_early_fusion_of_them(tmp_path: Path) -> None:
    config = parse(representations={"scene": ["image", "audio"]})
    assert config == parse(representations=fused("early", "image", "audio"))
    run_config.dump(config, tmp_path / "run.yaml")
    assert run_config.load(tmp_path / "run.yaml") == config
    overridden = run_config.load(tmp_path / "run.yaml", ["representations.scene=[audio,text]"])
    assert overridden.representations["scene"].parts == ("audio", "text")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_that_comes_along_is_valid(path: Path) -> None:
    assert run_config.load(path).name


@pytest.mark.parametrize("sections,message", [
    ({"trian": {}}, "unknown key 'trian'; did you mean train?"),
    ({"moe": {"num_exprts": 4}}, "unknown key 'moe.num_exprts'; did you mean num_experts?"),
    ({"moe": {"losses": {"entropy": 1}}}, "unknown key 'moe.losses.entropy'"),
    ({"data": {"train": [{"path": "a", "wieght": 1}], "tokenizer": "t"}}, "did you mean weight?"),
    ({"data": {}}, "data.train: required, and missing"),
    ({"data": {"train": 3}},
     "data.train: must be a path, or a list of sources; e.g. data.train=DIR or 'data.train=[{path: DIR, weight: 2}]' "
     "(got 3)"),
    ({"data": {"train": ["a", 3]}}, "data.train: must be a path, or a list of sources"),
    ({"data": {"train": [{"path": "a"}], "tokenizer": "t", "read_timeout": 100}},
     "data.read_timeout 100 exceeds the 96 seconds after which a data worker counts as hung"),
    ({"data": {"train": [{"path": "a"}], "tokenizer": "t", "cache": {"folder": "c", "size_gb": 0.01}}},
     "data.cache.size_gb 0.01 has no room for four blocks of data.cache.block_mb 8; raise it to 0.032"),
    ({"train": {"steps": 0}}, "train.steps: Input should be greater than or equal to 1 (got 0)"),
    ({"train": {"steps": "many"}}, "train.steps"),
    ({"model": {"hidden_size": 100, "num_heads": 8}}, "use a multiple of 16"),
    ({"model": {"hidden_size": 96, "num_heads": 6, "num_kv_heads": 4}},
     "num_kv_heads 4 does not divide model.num_heads 6, so that heads of queries could not share those of keys and "
     "values evenly; use one of [1, 2, 3, 6]"),
    ({"modalities": of("image", size=50, patch=16)},
     "modalities.image: size 50 of an image is not a multiple of patch 16"),
    ({"modalities": of("audio", patch=6)}, "patch must be a power of two, not 6"),
    ({"modalities": of("image", szie=8)}, "unknown key 'modalities.image.szie'; did you mean size?"),
    ({"modalities": of("image", size=4)},
     "modalities.image.size: Input should be greater than or equal to 8 (got 4)"),
    ({"modalities": {"image": {"kind": "imge"}}},
     "modalities.image: there is no modality kind 'imge'; did you mean image?"),
    ({"modalities": {"x": {"kind": "lidar"}}},
     "there is no modality kind 'lidar'; there are audio, audio_codes, image,"),
    ({"modalities": {"image": {"size": 64}}},
     "modalities.image: it has no kind; give one of audio, audio_codes, image,"),
    ({"modalities": {"image": {"size": 64}}}, "rewritten by mmmoe config upgrade FILE"),
    ({"modalities": {"image": 3}}, "modalities.image: it has no kind"),
    ({"modalities": ["image"]}, "modalities: Input should be a valid dictionary (got ['image'])"),
    ({"train": {"cpu": True}}, "train.cpu: Input should be a mapping of settings, e.g. {} (got True)"),
    ({"modalities": {}}, "modalities: Dictionary should have at least 1 item"),
    ({"modalities": {"Image": {"kind": "image"}}}, "modalities.Image: a name is at most 40 lower-case letters, "),
    ({"modalities": {"a-b": {"kind": "image"}}}, "modalities.a-b: a name is at most 40 lower-case letters"),
    ({"modalities": {3: {"kind": "image"}}}, "modalities.3: a name is at most 40 lower-case letters"),
    ({"modalities": {"a" * 41: {"kind": "image"}}}, "a name is at most 40 lower-case letters"),
    ({"modalities": {"type": {"kind": "image"}}},
     "modalities.type: the name is reserved by torch; choose e.g. type_1"),
    ({"modalities": of("text", label_with=["imgae"])}, "modalities.text.label_with imgae: it names other modalities"),
    ({"objectives": {"train": {"kind": "contrastive", "pairs": PAIRS}}}, "objectives.train: the name is reserved"),
    ({"objectives": {"a": {"kind": "clip"}}},
     "there is no objective kind 'clip'; there are classify, completion, contrastive, deep_cca,"),
    ({"objectives": objectives({"weight": 0}, None)},
     "none of contrastive has a weight, so there is nothing to learn"),
    ({"objectives": objectives({"weight": [[0, 0.0], [9, 0.0]]}, None)}, "nothing to learn"),
    ({"objectives": objectives({"pairs": {"image-text": 0}}, None)}, "nothing to learn"),
    ({"objectives": {}}, "objectives: Dictionary should have at least 1 item"),
    ({"objectives": objectives({"pairs": {}}, None)},
     "objectives.contrastive.pairs: Dictionary should have at least 1"),
    ({"objectives": objectives({"pairs": {"image-text": -1}})}, "greater than or equal to 0 (got -1)"),
    ({"objectives": objectives({"pairs": {"image-words": 1}})},
     "pairs 'image-words' is not two of image, audio, text"),
    ({"objectives": objectives({"pairs": {"text-text": 1}})}, "pairs 'text-text' is not two of image, audio, text"),
    ({"representations": {"scene": ["image", "adio"]}},
     "representations.scene: there is no modality adio; did you mean audio?"),
    ({"representations": {"text": ["image"]}}, "every modality is a representation under its own name"),
    ({"representations": {"scene": []}}, "name one modality or more"),
    ({"representations": {"scene": ["image", "image"]}}, "name one modality or more, each once"),
    ({"representations": fused("late", "image", "adio")},
     "representations.scene: there is no modality adio; did you mean audio?"),
    ({"representations": fused("late", "image")}, "name two modalities or more, each once"),
    ({"representations": fused("gated", "image", "image")}, "['image', 'image']: every modality is a representation"),
    ({"representations": {"text": {"kind": "late", "parts": ["image", "audio"]}}}, "choose another name"),
    ({"representations": fused("lates", "image", "audio")},
     "representations.scene: there is no representation kind 'lates'; did you mean late?"),
    ({"representations": {"scene": {"parts": ["image"]}}},
     "representations.scene: it has no kind; give one of bottleneck, early"),
    ({"representations": fused("late", "image", "audio", weight=1)},
     "unknown key 'representations.scene.weight'; did you mean weights?"),
    ({"representations": fused("late", "image", "audio", missing="drop")}, "representations.scene.missing: Input"),
    ({"representations": fused("early", "image", "audio", missing="bank")},
     "representations.scene: missing: bank puts learned vectors in the place of absent parts behind the trunk, and "
     "kind early joins its parts before it; use missing: allow, or a kind"),
    ({"representations": fused("late", *(f"image_{i}" for i in range(7)), missing="bank")},
     "a vector for each part and each combination of the others, 441 for 7 parts; use at most 6 parts"),
    ({"representations": fused("late", "image", "audio", weights={"image": 1.0})},
     "representations.scene: weights {'image': 1.0} are not of the parts image, audio; give one to each"),
    ({"representations": fused("late", "image", "audio", weights={"image": 1.0, "audio": 0})}, "greater than 0"),
    ({"representations": fused("tensor", "image", "audio", "text", size=32)},
     "size 32 with 3 parts makes (size + 1) ** 3 = 35,937 products, and 32,768 are the most; set size to 31 or less"),
    ({"representations": fused("tensor", "image", "audio", size=10**12)}, "scene.size: Input should be less than"),
    ({"representations": fused("low_rank", "image", "audio", rank=0)}, "representations.scene.rank: Input should be"),
    ({"representations": fused("graph", "image", "audio", edges=[])},
     "representations.scene: edges [] join no token with one of another part; add modality or similarity"),
    ({"representations": fused("graph", "image", "audio", edges=["time"])}, "edges ['time'] join no token"),
    ({"representations": fused("graph", "image", "audio", edges=["depth"])}, "Input should be 'modality', 'time'"),
    ({"representations": fused("graph", "image", "audio", edges=["modality", "space"])},
     "grid {} with edges ['modality', 'space'] of image, audio: edges of space are of the parts in grid"),
    ({"representations": fused("bottleneck", "image", "audio", num_layers=1)}, "greater than or equal to 2 (got 1)"),
    ({"representations": fused("latents", "image", "audio", num_latents=0)}, "scene.num_latents: Input should be"),
    ({"modalities": {"a": {"kind": "image", "members": ["png"]}, "b": {"kind": "image", "members": [".PNG"]}}},
     "members names png more than once"),
    ({"objectives": {"total": {"kind": "next_token"}}}, "that of other losses; choose e.g. total_1"),
    ({"representations": {"forward": ["image"]}}, "representations.forward: the name is reserved"),
    ({"moe": {"losses": {"min_experts": {"imge": 2}}}},
     "moe.losses.min_experts: there is no modality imge; did you mean image?"),
    ({"moe": {"losses": {"entropy_modalities": ["video"]}}}, "the modalities are image, audio, text"),
    ({"evaluate": {"rows": {"image-txt": {"subset": ["a"]}}}},
     "evaluate.rows 'image-txt' is not two of image, audio, text joined by -; e.g. image-audio"),
    ({"moe": {"every": 3}}, "moe.every 3 exceeds model.num_layers 2"),
    ({"evaluate": {"prompt": "an image of {label}"}}, "must hold {} once"),
    ({"runs_dir": "s3://bucket/runs"}, "runs_dir: it must be a folder that is mounted; for checkpoints behind a URL"),
    ({"runs_dir": None}, "runs_dir: Input should be a valid string (got None; YAML reads ~ alone as null, so"),
    ({"name": "../elsewhere"}, "name: String should match pattern"),
])  # fmt: skip
def test_bad_values_are_refused_with_the_remedy(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(**sections)
    assert message in str(caught.value)


@pytest.mark.parametrize("train", ["a", {"path": "a"}, ["a"], [{"path": "a"}]])
def test_a_path_alone_is_a_source(train: object) -> None:
    config = parse(data={"train": train, "tokenizer": "t"}, evaluate={"test": "b"})
    assert [(source.path, source.weight) for source in config.data.train] == [("a", 1.0)]
    assert config.evaluate.test == ("b",)


def test_a_path_alone_is_the_folder_of_the_cache(tmp_path: Path) -> None:
    run_config.dump(parse(), tmp_path / "run.yaml")
    cache = run_config.load(tmp_path / "run.yaml", ["data.cache=/scratch/cache"]).data.cache
    assert cache == run_config.CacheConfig(folder="/scratch/cache")


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


MINIMAL = """name: a
data: {train: [{path: p}]}
modalities: {text: {kind: text}, photo: {kind: image, size: 64}}
objectives: {reading: {kind: next_token}}
"""


def test_overrides_reach_into_sections_and_lists(tmp_path: Path) -> None:
    config = run_config.load(write(tmp_path, MINIMAL), [
        "train.steps=7", "data.train.0.weight=2.5", "moe.every=1", "modalities.photo.size=32",
        "modalities.other={kind: image}", "objectives.reading.weight=[[0, 0], [10, 0.5]]",
    ])  # fmt: skip
    assert (config.train.steps, config.data.train[0].weight, config.moe.every) == (7, 2.5, 1)
    sizes: Any = {name: settings for name, settings in config.modalities.items() if settings.kind == "image"}
    assert {name: settings.size for name, settings in sizes.items()} == {"photo": 32, "other": 48}
    assert config.objectives["reading"].weight == ((0, 0.0), (10, 0.5))
    assert config.stream_names == StreamNames(("text", "photo", "other"), ("reading",))


@pytest.mark.parametrize("override,message", [
    ("train.steps", "is not key=value"),
    ("name.steps=1", "'name' is a value"),
    ("data.train.5.weight=1", "'5' is not an index"),
    ("train.stpes=1", "did you mean steps?"),
    ("train.lr=3", "unknown key 'train.lr'; did you mean optimizer.learning_rate?"),
    ("tp=2", "unknown key 'tp'; did you mean parallel.tensor_parallel_size?"),
    ("model.num_experts=4", "unknown key 'model.num_experts'; did you mean moe.num_experts?"),
    ("optimizer.betas=[0.9, 0.95]", "did you mean optimizer.beta1 and optimizer.beta2?"),
    ("modalities.photo.dim=1", "known keys: kind, members"),
    ("modalities.photo.szie=1", "did you mean size?"),
    ("objectives.reading.parts=[photos, text]",
     "objectives.reading names photos, and the modalities are text, photo"),
])  # fmt: skip
def test_bad_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        run_config.load(write(tmp_path, MINIMAL), [override])
    assert message in str(caught.value)


def test_what_an_unknown_key_is_said_to_mean_is_a_setting() -> None:
    for ours in OUR_KEYS:
        for key in ours.split(" and "):
            settings: Any = run_config.RunConfig
            for part in key.split("."):
                assert part in settings.model_fields, f"{key}: there is no {part}"
                settings = settings.model_fields[part].annotation
    assert len(OURS) == sum(map(len, OUR_KEYS.values())), "a name stands twice"


@pytest.mark.parametrize("text,message", [("- a\n", "not a mapping"), ("a: [\n", "not valid YAML")])
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_config.load(write(tmp_path, text))
    with pytest.raises(ValueError, match="no config at"):
        run_config.load(tmp_path / "none.yaml")


# A config of version 0.11: the demo's of that time.
OLD_DEMO = """
name: demo
seed: 1
data:
  train: [{path: data/demo/tuxpaint-spoken/train, weight: 3}, {path: data/demo/mini/train}]
  tokenizer: data/demo/tokenizer.model
  image_flip: false
  label_text: 0.25
modalities:
  image: {size: 64, patch: 16}
  audio: {sample_rate: 16000, patch: 8, max_seconds: 4.0}
  text: {max_tokens: 48}
moe: {losses: {min_experts: {image: 5, audio: 4, text: 4}}}
objectives:
  contrastive: {pairs: {image-text: 1.5, audio-text: 1.0, image-audio: 0.5}}
  captioning: {weight: 0.25, fraction: 0.25}
evaluate:
  test: [data/demo/tuxpaint-named/test]
  image_rows: {subset: [named], language: [en]}
"""
NEW_DEMO = """
name: demo
seed: 1
data:
  train: [{path: data/demo/tuxpaint-spoken/train, weight: 3}, {path: data/demo/mini/train}]
  tokenizer: data/demo/tokenizer.model
modalities:
  image: {kind: image, size: 64, patch: 16, mean: 0.7, std: 0.35, flip: false}
  audio: {kind: audio, sample_rate: 16000, patch: 8, max_seconds: 4.0}
  text: {kind: text, max_tokens: 48, label_probability: 0.25, label_with: [image]}
moe: {losses: {min_experts: {image: 5, audio: 4, text: 4}}}
objectives:
  contrastive: {kind: contrastive, pairs: {image-text: 1.5, audio-text: 1.0, image-audio: 0.5}}
  captioning: {kind: next_token, parts: [[image, audio], text], weight: 0.25, fraction: 0.25}
evaluate:
  test: [data/demo/tuxpaint-named/test]
  rows: {image-text: {subset: [named], language: [en]}}
  by: {audio: audio_kind}
  within: language
"""


def test_a_config_of_before_is_refused_until_it_is_upgraded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no kind.*mmmoe config upgrade FILE"):
        run_config.load(write(tmp_path, OLD_DEMO))
    old, new = yaml.safe_load(OLD_DEMO), yaml.safe_load(NEW_DEMO)
    assert needs_upgrade(old) and not needs_upgrade(new)
    assert run_config.parse(upgraded(old)) == run_config.parse(new)
    assert upgraded(new) is new
    assert old == yaml.safe_load(OLD_DEMO), "the values that were given are left alone"


def test_a_kind_of_another_package_without_settings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_installed", lambda group: {"bare": "json:JSONDecoder"})
    with pytest.raises(ValueError, match=r"modalities\.a: modality kind bare has no class Settings"):
        parse(modalities={"a": {"kind": "bare"}})


def test_config_upgrade_rewrites_a_file_once_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = write(tmp_path, OLD_DEMO)
    before, kept = path.read_text(), path.with_name(path.name + ".old")
    upgrade(path)
    assert kept.read_text() == before
    after = path.read_text()
    assert run_config.load(path) == run_config.parse(yaml.safe_load(NEW_DEMO))
    upgrade(path)
    assert path.read_text() == after
    path.write_text(before)
    with pytest.raises(ValueError, match="exists, and would be lost"):
        upgrade(path)
    with pytest.raises(ValueError, match=r"no config at .*absent"):
        upgrade(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="is a folder; give a YAML file"):
        upgrade(tmp_path)


def test_config_upgrade_drops_no_name_that_it_does_not_know() -> None:
    for section, name in (("modalities", "imgae"), ("objectives", "contrastiv")):
        with pytest.raises(ValueError, match=f"{section} has {name} without a kind; earlier versions had"):
            upgraded({section: {name: {}}})


def test_a_run_without_text_has_no_vocabulary() -> None:
    config = run_config.parse(yaml.safe_load(NEW_DEMO))
    with pytest.raises(ValueError, match=r"no modality reads text, but model.vocab_size is 5; set it to 0"):
        config.with_vocabulary(5).with_vocabulary(0)


@pytest.mark.parametrize("old", [{"modalities": ["image"]}, {"modalities": {"image": 32}}, {"evaluate": "x"},
                                 {"objectives": {"captioning": 0.5}}])  # fmt: skip
def test_a_section_that_is_none_is_not_upgraded(old: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not a mapping of settings"):
        upgraded(old)


def test_what_an_old_config_left_out_is_what_was_meant_then() -> None:
    """Three modalities, the contrastive objective with three pairs, and captioning at weight 0."""
    old = {
        "name": "a",
        "data": {"train": [{"path": "p"}], "tokenizer": "t", "text_dropout": 0.1, "audio_augment": False},
    }
    config: Any = run_config.parse(upgraded(old))
    assert list(config.modalities) == ["image", "audio", "text"]
    assert (config.modalities["image"].mean, config.modalities["image"].std) == (0.7, 0.35)
    assert (config.modalities["text"].dropout, config.modalities["audio"].augment) == (0.1, False)
    assert config.stream_names.tasks == ("contrastive",)
    assert config.objectives["contrastive"].pairs == {"image-text": 1.0, "audio-text": 1.0, "image-audio": 0.5}


@pytest.mark.parametrize(("given", "own", "state"), [
    ({}, {"beta1": 0.9, "beta2": 0.98, "eps": 1e-8}, ("exp_avg", "exp_avg_sq")),
    ({"beta1": 0.8, "eps": None}, {"beta1": 0.8, "beta2": 0.98, "eps": 1e-8}, ("exp_avg", "exp_avg_sq")),
    ({"kind": "sgd"}, {"momentum": 0.9}, ("momentum_buffer",)),
    ({"kind": "sgd", "momentum": 0.0}, {"momentum": 0.0}, ()),
])  # fmt: skip
def test_each_kind_has_its_own_settings_and_state(
    tmp_path: Path, given: dict[str, Any], own: dict[str, float], state: tuple[str, ...]
) -> None:
    config = tiny_config(tmp_path, optimizer=given)
    assert config.optimizer.own == own and config.optimizer.state == state
    run_config.dump(config, tmp_path / "config.yaml")
    assert run_config.load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("given", "message"), [
    ({"kind": "sgd", "beta1": 0.9}, "optimizer.beta1 0.9 .*kind adamw, .* sgd; remove beta1, or set kind: adamw"),
    ({"momentum": 0.9}, "optimizer.momentum 0.9 .*kind sgd, .* adamw; remove momentum, or set kind: sgd"),
    ({"kind": "adagrad"}, "optimizer.kind: .*'adamw' or 'sgd'.*adagrad"),
    ({"kind": "sgd", "momentum": 1.0}, "optimizer.momentum: .*less than 1"),
])  # fmt: skip
def test_a_setting_of_another_kind_is_refused_with_what_would_work(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, optimizer=given)


def test_a_weight_that_is_no_list_of_pairs_is_told_with_an_example(tmp_path: Path) -> None:
    run_config.dump(parse(), tmp_path / "run.yaml")
    with pytest.raises(ValueError, match=r"weight \[0, 1, 100, 2\] is no number or \[\[step, weight\], "):
        run_config.load(tmp_path / "run.yaml", ["data.train.0.weight=[0,1,100,2]"])
