"""Semantic anchors: the loss against loops over samples, the anchors of samples, and the file of vectors of a run."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmmoe_pretrain.batch import Sample
from mmmoe_pretrain.checkpoint.model import CONFIG, read_config
from mmmoe_pretrain.config import RunConfig
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.modalities.word_vectors import WordVectors
from mmmoe_pretrain.models.pretraining import PretrainingModel
from mmmoe_pretrain.objectives import step_counts
from mmmoe_pretrain.train import start
from tests.support import VECTORS, objectives, pack_settings, random_sample, tiny_config

ANCHORS = {"kind": "semantic_anchors", "of": "image", "text": "text", "vectors": str(VECTORS), "size": 8}
TEXTS = {"it": ("red", "red", "green black", "brown"), "i": ("",), "t": ("pink", "pink")}


def config_with(root: Path = Path("unused"), **settings: Any) -> RunConfig:
    return tiny_config(root, objectives={**objectives(), "anchors": {**ANCHORS, **settings}})


def samples(config: RunConfig) -> list[Sample]:
    """With the texts above; the two that are pink have groups 5 and 0, of which 0 is that of the first red one."""
    found = []
    for number, (has, text) in enumerate((has, text) for has, texts in TEXTS.items() for text in texts):
        sample = random_sample(number, has, config)
        items = [dataclasses.replace(item, raw=text) if item.modality == "text" else item for item in sample.items]
        meta = dataclasses.replace(sample.meta, group="g0" if number == 6 else f"g{number}", label=text)
        found.append(dataclasses.replace(sample, items=tuple(items), meta=meta))
    return found


@pytest.mark.parametrize("words", [{}, {"text": "", "field": "label"}], ids=["of texts", "of a field"])
def test_the_loss_is_the_hinge_rank_over_anchors_of_other_groups(words: dict[str, str]) -> None:
    margin = 0.3
    config = config_with(margin=margin, **words)
    batch, model = pack(samples(config), pack_settings(config)), PretrainingModel(config)
    outputs, _ = model.mmmoe(batch)
    mapped = (outputs.features["image"] @ model.tasks["anchors"].get_parameter("map").t()).detach().numpy()
    vectors = WordVectors(VECTORS)
    mean = [vectors.vectors[[vectors.numbers[w] for w in text]].mean(0) for text in (["red"], ["green", "black"],
                                                                                    ["pink"])]  # fmt: skip
    red, dark, pink = (one / np.linalg.norm(one) for one in mean)

    def hinge(sample: int, own: np.ndarray, *others: np.ndarray) -> float:
        return float(np.mean([max(0.0, margin - own @ mapped[sample] + one @ mapped[sample]) for one in others]))

    # Of seven samples: 0 and 1 are red and no negatives of each other, 2 is dark, 3 has no known word, 4 no word, and
    # 5 and 6 no image. Sample 6 is of the group of 0.
    expected = hinge(0, red, dark, pink) + hinge(1, red, dark, pink, pink) + hinge(2, dark, red, red, pink, pink)
    counts = step_counts([batch], model.objectives, None, torch.device("cpu"))
    assert counts.terms["anchors/image"] == 3
    model.begin_step(0, counts)
    _, report = model(batch)
    assert float(report.losses["anchors/image"]) == pytest.approx(expected / 3, rel=1e-5)  # fp32


def test_classes_are_scored_by_the_product_of_their_words_and_the_mapped_feature() -> None:
    config = config_with()
    objective, module = pack_settings(config).objectives["anchors"], PretrainingModel(config).tasks["anchors"]
    scores_C = objective.class_features(module, ["Red.", "no such", "black green"]) @ np.ones(8)
    vectors, mapped = WordVectors(VECTORS), module.get_parameter("map").detach().numpy() @ np.ones(8)
    expected = [vectors.mean("red") @ mapped, 0, vectors.mean("green black") @ mapped]
    np.testing.assert_allclose(scores_C, expected, rtol=1e-5, atol=1e-6)  # fp32


def test_without_any_sample_that_takes_part_the_map_has_a_gradient_of_zero() -> None:
    config = config_with()
    model = PretrainingModel(config)
    for has in (["t", "a"], []):
        batch = pack([random_sample(i, one, config) for i, one in enumerate(has)], pack_settings(config))
        model.begin_step(0, step_counts([batch], model.objectives, None, torch.device("cpu")))
        loss, _ = model(batch)
        loss.backward()
        gradient = model.tasks["anchors"].get_parameter("map").grad
        assert gradient is not None and not gradient.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": ""}, r"objectives.anchors: give the modality of the words as text, or the field"),
        ({"field": "label"}, r"objectives.anchors: give the modality of the words as text, or the field"),
        ({"of": "imag"}, r"objectives.anchors.of imag: there is no such representation; did you mean image\?"),
        ({"text": "audio"}, r"objectives.anchors.text audio is no modality of texts; there are text"),
        ({"margin": 0}, r"objectives.anchors.margin: .* greater than 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_with(**settings)


def test_a_file_that_is_not_that_of_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"have 8 numbers each, and the objective has size 4; set size: 8"):
        config_with(size=4).with_files()
    with pytest.raises(ValueError, match=r"no word vectors at .*absent.npz; make the file by mmmoe-data words"):
        config_with(vectors="absent.npz").with_files()
    with pytest.raises(ValueError, match=r"have fingerprint .*, but the run was made with 12ab"):
        config_with(fingerprint="12ab").with_files()


def test_a_run_keeps_a_copy_of_the_vectors_and_resumes_with_no_other(tmp_path: Path) -> None:
    given, other = tmp_path / "given.npz", tmp_path / "other.npz"
    shutil.copyfile(VECTORS, given)
    content = dict(np.load(VECTORS))
    np.savez(other, **{**content, "vectors": -content["vectors"]})
    config = config_with(tmp_path, vectors=str(given)).with_files()
    config.run_dir.mkdir(parents=True)
    start.write_config(config, "")
    given.unlink()
    for found in (read_config(config.run_dir), start.config_to_train(config.run_dir / CONFIG)):
        assert found.objectives["anchors"].file == str(config.run_dir / "objectives.anchors.npz")
        start.check_same_model(found.with_files(), config.run_dir / CONFIG)
    changed = config_with(tmp_path, vectors=str(other)).with_files()
    with pytest.raises(ValueError, match=r"objectives.anchors.vectors was .* set it back"):
        start.check_same_model(changed, config.run_dir / CONFIG)
