"""Scores where a modality is missing: every way on a random model, and the bank against loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.batch import SampleMeta
from mmmoe_pretrain.checkpoint import store
from mmmoe_pretrain.checkpoint.state import model_key
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.config.evaluate import ImputeConfig
from mmmoe_pretrain.data.evaluation import iterate_eval
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.evaluate import run
from mmmoe_pretrain.evaluate.features import HeldOut
from mmmoe_pretrain.evaluate.imputation import Bank, Case, cases_of
from mmmoe_pretrain.evaluate.report import Report
from mmmoe_pretrain.modalities import build_modalities
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import objectives_of
from tests.support import pack_settings, things, tiny_config, write_shards, write_tokenizer

COMPLETE = {"kind": "completion", "source": "image", "target": "scene", "hidden_size": 12}
WAYS = ("", "_neighbours", "_by_complete", "_present")
TESTED = 7  # held-out rows, of which the last two have no audio


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("imputation")
    write_shards(root / "train", things(20)[8:])
    rows = things(TESTED)
    write_shards(root / "test" / "whole", rows[:5])
    write_shards(root / "test" / "mute", rows[5:], lacking=("audio",))
    write_tokenizer(root / "tokens.model")
    return tiny_config(
        root,
        representations={"scene": {"kind": "late", "parts": ["image", "audio"], "missing": "allow"}},
        objectives={"pairs": {"kind": "contrastive", "pairs": {"scene-text": 1.0, "scene-image": 1.0}},
                    "complete": COMPLETE},
        evaluate={"test": [str(root / "test" / part) for part in ("whole", "mute")],
                  "impute": {"scene": {"observed": "image", "neighbours": 3}}},
    )  # fmt: skip


Scored = tuple[Report, PretrainingModel]


def evaluated(folder: Path, config: RunConfig, **sections: Any) -> Scored:
    """The report of a random model, whose objectives have a checkpoint."""
    config = config.model_copy(update=sections)
    model = PretrainingModel(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {model_key(f"tasks.{name}"): p.detach() for name, p in model.tasks.named_parameters()}
    store.write_state(folder / "checkpoints", 7, state, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_model", lambda *_: (model.mmmoe.eval(), config, 7))
        return run.evaluate(folder), model


@pytest.fixture(scope="module")
def scored(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    return evaluated(tmp_path_factory.mktemp("scored"), config)


def test_every_way_is_scored_on_the_rows_that_have_all(scored: Scored, config: RunConfig, tmp_path: Path) -> None:
    report, _ = scored
    rows = {row["metric"]: row for row in report.results}
    found = {name: row for name, row in rows.items() if name.startswith("scene_given_image")}
    ways = [f"scene_given_image{way}" for way in WAYS]
    # Nothing is compared with the image, which the query has, nor the true vector with itself.
    assert found.keys() == {
        *(f"{way}_to_text_r{k}" for way in ways for k in (1, 10)),
        *(f"{way}_to_scene_r{k}" for way in ways[:3] for k in (1, 10)),
        *(f"{way}_cosine" for way in ways[:3]),
    }
    assert {row["n"] for row in found.values()} == {5}
    assert all(row["candidates"] == 5 for name, row in found.items() if "_r1" in name)
    assert rows["scene_to_text_r1"]["n"] == TESTED
    assert [note for note in report.notes if note.startswith("scene_given_image")] == [
        "scene_given_image: what stands in for scene where only image is given, of rows with image and scene; "
        "_neighbours: the mean of the 3 nearest of 12 training samples"
    ]
    plain, _ = evaluated(tmp_path, config, evaluate=config.evaluate.model_copy(update={"impute": {}}))
    names = {row["metric"] for row in plain.results}
    assert {name for name in names if "given" in name} == {name for name in found if "neighbours" not in name}
    assert {row["metric"]: row for row in plain.results} == {name: rows[name] for name in names}


def vectors(model: PretrainingModel, paths: list[str], has: set[str]) -> dict[str, np.ndarray]:
    """Features of all samples, of their modalities in ``has`` alone."""
    modalities = build_modalities(model.config.modalities, model.config.data.tokenizer)
    ((_, samples),) = iterate_eval(paths, model.config, modalities, 64)
    left = [replace(sample, items=tuple(i for i in sample.items if i.modality in has)) for sample in samples]
    batch = pack(left, pack_settings(model.config))
    with torch.no_grad():
        return {name: rows.numpy() for name, rows in model.mmmoe(batch)[0].features.items()}


def test_the_scores_are_those_of_vectors_made_one_by_one(scored: Scored) -> None:
    report, model = scored
    whole, every = model.config.evaluate.test[0], {"image", "audio", "text"}
    true, image = vectors(model, [whole], every), vectors(model, [whole], {"image"})
    train = vectors(model, [model.config.data.train[0].path], every)
    near = [np.argsort(-train["image"] @ one)[:3] for one in true["image"]]
    with torch.no_grad():
        head = model.tasks["complete"]
        said = head.predicted(head.output({"image": torch.from_numpy(true["image"])})).numpy()
    ways = {
        "": image["scene"],
        "_neighbours": np.stack([train["scene"][chosen].mean(axis=0) for chosen in near]),
        "_by_complete": said,
        "_present": true["scene"],
    }
    assert len(true["scene"]) == 5 and len(train["scene"]) == 12
    for way, rows in ways.items():
        name, unit = f"scene_given_image{way}", rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for target in ("text", "scene") if way != "_present" else ("text",):
            first = [int((true[target] @ unit[i]).argmax()) == i for i in range(5)]
            assert report.value(f"{name}_to_{target}_r1") == pytest.approx(np.mean(first)), (name, target)
        if way != "_present":
            cosines = [float(unit[i] @ true["scene"][i]) for i in range(5)]
            assert report.value(f"{name}_cosine") == pytest.approx(np.mean(cosines), abs=1e-6), name  # fp32


def test_the_baselines_of_a_cosine_are_another_row_and_the_best_fixed_answer(scored: Scored) -> None:
    report, model = scored
    true = vectors(model, [model.config.evaluate.test[0]], {"image", "audio", "text"})["scene"].astype(np.float64)
    (row,) = [row for row in report.results if row["metric"] == "scene_given_image_by_complete_cosine"]
    others = [true[i] @ true[j] for i in range(5) for j in range(5) if i != j]
    fixed = true.mean(axis=0) / np.linalg.norm(true.mean(axis=0))
    assert (row["chance"], row["majority"]) == pytest.approx((np.mean(others), np.mean(true @ fixed)), abs=1e-6)


def held_out(features: dict[str, np.ndarray], lacking: dict[str, set[int]]) -> HeldOut:
    count = len(next(iter(features.values())))
    content = {
        name: tuple("" if i in lacking.get(name, ()) else f"{name} {i}" for i in range(count)) for name in features
    }
    has = tuple(frozenset(name for name in features if i not in lacking.get(name, ())) for i in range(count))
    return HeldOut(tuple(SampleMeta(f"{i}") for i in range(count)), ("",) * count, content, features, {}, (), 0, has)


def test_a_bank_is_of_complete_samples_and_may_be_smaller_than_asked_for() -> None:
    rng = np.random.default_rng(0)
    drawn = {name: rng.normal(size=(n, 4)) for name, n in (("a", 6), ("b", 6), ("c", 6), ("qa", 3), ("qb", 3))}
    unit = {
        name: (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32) for name, rows in drawn.items()
    }
    bank = Bank(held_out({name: unit[name] for name in "abc"}, {"a": {1}, "c": {4}}))
    queries = held_out({"a": unit["qa"], "b": unit["qb"]}, {})
    usable = [0, 2, 3, 5]
    for asked, used in ((2, 2), (9, 4)):
        found = bank.impute(Case("c", ("a", "b"), ("c",), asked), queries)
        for i in range(3):
            near = sorted(usable, key=lambda j: -(unit["qa"][i] @ unit["a"][j] + unit["qb"][i] @ unit["b"][j]))[:used]
            mean = unit["c"][near].sum(axis=0)
            np.testing.assert_allclose(found[i], mean / np.linalg.norm(mean), rtol=1e-5)


def test_entries_and_objectives_of_the_same_target_and_observed_are_one_case() -> None:
    complete = {**COMPLETE, "source": ["image", "text"], "target": "audio"}
    other = {**complete, "source": "text", "head": "mixture"}
    config = tiny_config(
        Path("unused"),
        objectives={"one": complete, "two": complete, "three": other},
        evaluate={"impute": {"audio": {"observed": ["text", "image"], "neighbours": 4}}},
    )
    assert cases_of(objectives_of(config), config.evaluate) == [
        Case("audio", ("text", "image"), ("audio",), 4, ("one", "two")),
        Case("audio", ("text",), ("audio",), 0, ("three",)),
    ]


def test_without_a_complete_sample_there_is_an_error_at_the_start(config: RunConfig, tmp_path: Path) -> None:
    withheld = {**config.modalities, "audio": config.modalities["audio"].model_copy(update={"withheld_share": 1.0})}
    impute = config.evaluate.model_copy(update={"impute": {"audio": ImputeConfig(observed=("text",))}})
    pairs = config.objectives["pairs"].model_copy(update={"pairs": {"audio-text": 1.0}})
    with pytest.raises(
        ValueError,
        match=r"evaluate.impute.audio: none of the 12 training samples that were read has text and audio, so there "
        r"is no bank .* set evaluate.impute.audio.neighbours: 0",
    ):
        evaluated(tmp_path, config, modalities=withheld, evaluate=impute, objectives={"pairs": pairs})
    assert not (tmp_path / "report.json").exists()


def test_what_cannot_be_scored_is_said(config: RunConfig, tmp_path: Path) -> None:
    """The training shards are gone, and no held-out row has all."""
    source = config.data.train[0].model_copy(update={"path": str(tmp_path / "elsewhere")})
    data = config.data.model_copy(update={"train": (source,)})
    report, _ = evaluated(tmp_path / "one", config, data=data)
    assert f"no scene_given_image_neighbours: the training shards {source.path} are missing" in report.notes
    assert not any("neighbours" in row["metric"] for row in report.results)
    mute = config.evaluate.model_copy(update={"test": config.evaluate.test[1:]})
    audio = config.objectives["complete"].model_copy(update={"target": "audio"})
    objectives = {"pairs": config.objectives["pairs"], "complete": audio}
    report, _ = evaluated(tmp_path / "two", config, evaluate=mute, objectives=objectives)
    assert "no held-out row has image and audio, with all parts: no score of audio_given_image" in report.notes


@pytest.mark.parametrize(
    ("impute", "message"),
    [
        ({"sound": {"observed": "image"}}, r"evaluate.impute sound: there is no such representation; there are"),
        ({"audio": {"observed": "imag"}}, r"evaluate.impute.audio.observed imag: .* did you mean image\?"),
        ({"audio": {"observed": "audio"}}, r"evaluate.impute audio has no modality beside those of audio"),
        ({"audio": {"observed": "image", "neighbours": -1}}, r"evaluate.impute.audio.neighbours: .* greater"),
    ],
)
def test_settings_that_cannot_be_are_refused(impute: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(Path("unused"), evaluate={"impute": impute})


def test_a_representation_that_no_objective_reads_is_refused(config: RunConfig, tmp_path: Path) -> None:
    impute = config.evaluate.model_copy(update={"impute": {"audio": ImputeConfig(observed=("image",))}})
    with pytest.raises(ValueError, match=r"evaluate.impute.audio needs audio, and no objective reads that"):
        evaluated(tmp_path, config, evaluate=impute)
    with pytest.raises(ValueError, match=r"evaluate.impute.audio needs audio, and no objective reads that"):
        objectives_of(config.model_copy(update={"evaluate": impute}))  # as training does at the start
