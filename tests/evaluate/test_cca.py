"""Linear CCA in closed form: against scikit-learn, and by hand."""

import dataclasses

import numpy as np
import pytest

from mmmoe_pretrain.batch import SampleMeta
from mmmoe_pretrain.config import EvaluateConfig
from mmmoe_pretrain.evaluate import cca, correlated, scores
from mmmoe_pretrain.evaluate.features import HeldOut


def related(samples: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    common = random.normal(size=(samples, 5))
    x = common @ random.normal(size=(5, 5)) + noise * random.normal(size=(samples, 5)) + 3
    return x, common @ random.normal(size=(5, 4)) + noise * random.normal(size=(samples, 4))


def test_correlations_and_variates_are_those_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.cross_decomposition", reason="needs the extra dev")
    x, y = related(200, 0.5)
    found = cca.fit(x, y)
    peer = decomposition.CCA(n_components=4, scale=False, max_iter=20_000, tol=1e-14).fit(x, y)
    for ours, theirs in zip((found.first.variates(x), found.second.variates(y)), peer.transform(x, y), strict=True):
        cosines_C = (ours * theirs).sum(axis=0) / np.linalg.norm(ours, axis=0) / np.linalg.norm(theirs, axis=0)
        np.testing.assert_allclose(np.abs(cosines_C), 1, atol=1e-6)  # it iterates until the weights move by 1e-7
    theirs_C = [np.corrcoef(a, b)[0, 1] for a, b in zip(*(part.T for part in peer.transform(x, y)), strict=True)]
    np.testing.assert_allclose(found.correlations_C, theirs_C, atol=1e-8)


def test_variates_are_white_and_correlate_in_pairs_alone() -> None:
    x, y = related(50, 1.0)
    found = cca.fit(x, y)
    first, second = found.first.variates(x), found.second.variates(y)
    np.testing.assert_allclose(first.T @ first, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(second.T @ second, np.eye(4), atol=1e-12)
    np.testing.assert_allclose(first.T @ second, np.diag(found.correlations_C), atol=1e-12)


def test_rows_that_are_equal_up_to_a_linear_map_are_embedded_alike() -> None:
    """Also rows that the fit has not seen, and where one direction has no variance."""
    x = np.random.default_rng(1).normal(size=(60, 3))
    y = np.concatenate([x @ np.array([[1.0, 2, 0], [0, 1, 3], [1, 0, 1]]) + 7, np.full((60, 1), 2.0)], axis=1)
    found = cca.fit(x[:20], y[:20])
    np.testing.assert_allclose(found.correlations_C, 1)
    np.testing.assert_allclose(found.embedded(x[20:]), found.embedded(y[20:], second=True), atol=1e-9)


def test_a_direction_without_correlation_does_not_count() -> None:
    """x and y share the first direction; their second ones are orthogonal."""
    x = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [2, 0], [-2, 0]])
    y = np.stack([x[:, 0], [1.0, -1, -1, 1, 0, 0]], axis=1)
    found = cca.fit(x, y)
    np.testing.assert_allclose(found.correlations_C, [1, 0], atol=1e-12)
    similarity = found.embedded(x) @ found.embedded(y, second=True).T
    np.testing.assert_allclose(similarity, np.sign(np.outer(x[:, 0], x[:, 0])), atol=1e-9)


def rows_of(image: np.ndarray, text: np.ndarray, has_text: int) -> HeldOut:
    """``has_text``: how many of the samples, the first ones, have a text."""
    names = [str(i) for i in range(len(image))]
    content = {"image": tuple(names), "text": tuple(names[:has_text] + [""] * (len(names) - has_text))}
    unit = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in
            (("image", image), ("text", text))}  # fmt: skip
    return HeldOut(tuple(map(SampleMeta, names)), content["text"], content, unit, {}, (),
                   projected={"image": image, "text": text})  # fmt: skip


def test_vectors_that_are_equal_up_to_a_linear_map_are_found() -> None:
    """Of training samples that have both; those of the held-out ones are not used for the fit."""
    random = np.random.default_rng(2)
    image, map_PP = random.normal(size=(90, 3)), random.normal(size=(3, 3))
    text = image @ map_PP + 5
    image[30:40] = random.normal(size=(10, 3))  # the training samples without a text
    train, data = rows_of(image[:40], text[:40], 30), rows_of(image[40:], text[40:], 50)
    pair, settings = ("image", "text"), EvaluateConfig()
    plain, _ = scores.retrieval_scores(data, pair, settings)
    found, notes = correlated.retrieval_scores(data, train, pair, settings, alone=True)
    beside, _ = correlated.retrieval_scores(data, train, pair, settings, alone=False)
    assert [score.metric for score in found] == [score.metric for score in plain]
    assert [score.metric for score in beside] == [score.metric.replace("_r", "_cca_r") for score in plain]
    assert max(score.value for score in plain if score.metric.endswith("r1")) < 0.2
    assert [score.value for score in found] == [score.value for score in beside] == [1.0] * 6
    assert notes == ["image and text are compared after linear CCA, fitted on 30 training samples"]
    few = dataclasses.replace(train, content={**train.content, "text": ("a", "b", "c") + ("",) * 37})
    assert correlated.retrieval_scores(data, few, pair, settings, alone=True) == ([], [
        "no score of image and text after linear CCA: 3 of the 40 training samples read have both, and 3 dimensions "
        "need more"
    ])  # fmt: skip
