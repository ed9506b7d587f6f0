"""How near generated values are to real ones, by features of one of the project's own models: a Frechet distance, as
FID is (Heusel et al., arXiv 1706.08500), and a cosine between what was asked for and what was made, as CLIPScore is
(Hessel et al., arXiv 2104.08718).

Features are vectors of a representation of a run (``features.encode``), not those of Inception or CLIP, so figures
compare models that are scored by the same run, and nothing beyond.

Shapes: N and M values, P numbers of a feature.
"""

from __future__ import annotations

import numpy as np


def frechet_distance(real_NP: np.ndarray, made_MP: np.ndarray) -> float:
    """Between the normal distributions that have the means and covariances of the two sets. Of fewer values than P
    covariances are singular, and the distance of two samples of one distribution is far from 0: compare like numbers.
    Raises ValueError where a set has no covariance, or features are not finite or of other sizes."""
    sets = [np.asarray(x, dtype=np.float64) for x in (real_NP, made_MP)]
    for what, x in zip(("real", "generated"), sets, strict=True):
        if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
            raise ValueError(
                f"{what} features {x.shape}: a Frechet distance needs two or more rows of finite numbers; give more "
                f"values, or the features of a model that did not diverge"
            )
    if sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(
            f"features of {sets[0].shape[1]} and {sets[1].shape[1]} numbers are not of one model; encode both by one"
        )
    (mean, covariance), (other_mean, other) = ((x.mean(axis=0), np.cov(x, rowvar=False, ddof=1)) for x in sets)
    return gaussian_distance(mean, np.atleast_2d(covariance), other_mean, np.atleast_2d(other))


def gaussian_distance(mean_P: np.ndarray, cov_PP: np.ndarray, other_P: np.ndarray, other_PP: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2) (Dowson and Landau, 1982), in fp64."""
    root_PP = _root(cov_PP)
    between = _root(root_PP @ other_PP @ root_PP)
    distance = np.square(mean_P - other_P).sum() + np.trace(cov_PP) + np.trace(other_PP) - 2 * np.trace(between)
    return float(max(distance, 0.0))  # rounding of equal distributions


def alignment(asked_NP: np.ndarray, made_NP: np.ndarray) -> np.ndarray:
    """float64 [N]: max(0, cosine) of each generated value with what it was to show, in the joint space of a run that
    aligns the two; CLIPScore is 2.5 times that of CLIP. Zero where either has no vector."""
    asked, made = (np.asarray(x, dtype=np.float64) for x in (asked_NP, made_NP))
    if asked.shape != made.shape or asked.ndim != 2:
        raise ValueError(f"features {asked.shape} and {made.shape} are not one row for each pair; give pairs")
    norms = np.linalg.norm(asked, axis=1) * np.linalg.norm(made, axis=1)
    products = (asked * made).sum(axis=1)
    return np.maximum(np.divide(products, norms, out=np.zeros_like(products), where=norms > 0), 0.0)


def _root(matrix_PP: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance; eigenvalues that rounding made negative are 0."""
    values, vectors = np.linalg.eigh((matrix_PP + matrix_PP.T) / 2)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)
