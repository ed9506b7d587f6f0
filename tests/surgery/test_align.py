"""Joint heads by linear CCA: those of the closed form, and nothing else of the run changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.data.pack import pack
from mmmoe_pretrain.evaluate import cca
from mmmoe_pretrain.models.mmmoe import MMMoE
from mmmoe_pretrain.surgery import align as module
from mmmoe_pretrain.surgery.align import _as_weight, _fit, _Rows, align
from mmmoe_pretrain.surgery.operation import Source
from tests.support import pack_settings, random_sample
from tests.surgery.support import model_of, random_source

PAIRS = {"pairs": {"kind": "contrastive", "pairs": {"image-text": 1.0, "audio-text": 1.0}}}


def of_rows(rows_NW: np.ndarray) -> _Rows:
    mean_W = rows_NW.mean(axis=0) / np.linalg.norm(rows_NW.mean(axis=0))
    return _Rows(rows_NW - np.outer(rows_NW @ mean_W, mean_W), np.ones(len(rows_NW), dtype=bool))


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_heads_without_a_bias_give_the_vectors_of_cca(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows whose mean is far from 0 in a direction without variance, where nothing is lost by leaving it out."""
    monkeypatch.setattr(module, "RIDGE", 0.0)
    random = np.random.default_rng(0)
    common = random.normal(size=(80, 3))
    sides = [common @ random.normal(size=(3, 5)) + random.normal(size=(80, 5)) for _ in range(2)]
    centred = [side - side.mean(axis=0) for side in sides]
    raised = [np.pad(side, ((0, 0), (0, 1)), constant_values=7) for side in centred]
    maps: dict[str, np.ndarray] = {}
    (did,) = _fit({"a": of_rows(raised[0]), "b": of_rows(raised[1])}, "a", "b", maps, 5)
    found = cca.fit(*centred)
    assert "80 training samples, 5 directions" in did
    for second, (name, rows) in enumerate(zip("ab", raised, strict=True)):
        head_PW = _as_weight(maps[name], random.normal(size=(5, 6)))
        expected = found.embedded(centred[second], second=bool(second))
        np.testing.assert_allclose(unit(rows @ head_PW.T), expected, atol=1e-9)


def test_a_later_pair_is_fitted_to_the_side_that_is_made() -> None:
    """Its rows are a linear map of that side's, so regression finds the map back, up to the ridge."""
    random = np.random.default_rng(1)
    a, b = random.normal(size=(200, 4)), random.normal(size=(200, 4))
    a += b @ random.normal(size=(4, 4))
    c = b @ random.normal(size=(4, 4))
    rows = {name: _Rows(its, np.ones(200, dtype=bool)) for name, its in zip("abc", (a, b, c), strict=True)}
    maps: dict[str, np.ndarray] = {}
    _fit(rows, "a", "b", maps, 4)
    assert _fit(rows, "c", "b", maps, 4)[0].startswith("head of c: regression to b over 200")
    assert (unit(c @ maps["c"]) * unit(b @ maps["b"])).sum(axis=1).min() > 0.99
    assert _fit(rows, "a", "c", maps, 4) == []  # both are made


def test_directions_that_are_not_found_keep_small_weights_that_can_learn() -> None:
    before = np.random.default_rng(2).normal(size=(4, 3))
    map_WC = np.array([[2.0, 0], [0, 0.5], [0, 0]])
    after = _as_weight(map_WC, before)
    assert np.linalg.norm(after) == pytest.approx(np.linalg.norm(before))
    scale = after[0, 0] / 2
    np.testing.assert_allclose(after[:2], map_WC.T * scale)
    assert np.linalg.norm(after[2:], axis=1).max() == pytest.approx(0.5 * scale)
    np.testing.assert_allclose(after[2] / np.linalg.norm(after[2]), before[2] / np.linalg.norm(before[2]))


def test_only_the_heads_of_pairs_change_and_pairs_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of noise have independent parts, which CCA makes alike by chance over 40 samples."""
    source = random_source(tmp_path, {}, objectives=PAIRS)
    samples = [random_sample(i, "iat", source.config) for i in range(40)]
    batch = pack(samples, pack_settings(source.config))
    monkeypatch.setattr(Source, "training_batches", lambda *_: iter([(batch, samples)]))
    heads = {name: source.model.joint_heads[name] for name in ("image", "audio", "text")}
    before = mean_cosine(source.model, batch)
    result = align(source, 40)
    assert {name: source.model.joint_heads[name] for name in heads} == heads  # they are back
    changed = {name for name, its in result.state.items() if not torch.equal(its.value, source.state[name].value)}
    assert changed == {f"mmmoe.joint_heads.{name}.weight" for name in heads}
    for name in changed:
        assert not any(kept.any() for kept in result.state[name].optimizer.values())
    after = mean_cosine(model_of(result.config, result.state), batch)
    assert after["image"] > 0.5 > abs(before["image"])
    assert after["audio"] > before["audio"]


def test_class_heads_on_a_representation_stay_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors before the heads have another width than the one that class heads read."""
    classes = {"kind": "classify", "of": "image", "classes": 3}
    source = random_source(tmp_path, {}, objectives={**PAIRS, "digits": classes})
    samples = [random_sample(i, "iat", source.config) for i in range(40)]
    batch = pack(samples, pack_settings(source.config))
    monkeypatch.setattr(Source, "training_batches", lambda *_: iter([(batch, samples)]))
    head = source.model.class_heads["digits"]
    assert "class heads of digits stay as they are" in align(source, 40).did[-1]
    assert source.model.class_heads["digits"] is head


def mean_cosine(model: MMMoE, batch: Batch) -> dict[str, float]:
    with torch.inference_mode():
        features = model(batch)[0].features
    return {name: float((features[name] * features["text"]).sum(dim=1).mean()) for name in ("image", "audio")}


def test_what_cannot_be_aligned_is_refused(tmp_path: Path) -> None:
    source = random_source(tmp_path, {})
    with pytest.raises(ValueError, match=r"linear CCA is of training samples .* is a stream or missing; bring"):
        align(source, 100)
    rows = {name: of_rows(np.random.default_rng(0).normal(size=(4, 4)) + 1) for name in "ab"}
    with pytest.raises(
        ValueError, match=r"4 of the 4 training samples read have both, and vectors of 4 numbers need"
    ):
        _fit(rows, "a", "b", {}, 4)
