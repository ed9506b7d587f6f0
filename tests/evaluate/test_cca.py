"""Linear CCA in closed form: against scikit-learn, and by hand."""

import numpy as np
import pytest

from mmmoe_pretrain.evaluate import cca


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
