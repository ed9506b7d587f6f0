"""Linear canonical correlation analysis in closed form (Hotelling 1936), as a baseline of retrieval, and for
embeddings that are alike up to a linear map (``Objective.correlated``).

By singular values, in fp64 (Björck and Golub 1973): with X = U S V' of centred rows, ``U S / sqrt(S^2 + r)`` is X
without its covariance; r is ``ridge`` of the mean of the diagonal of X'X. The singular values of the product of two
such matrices are the canonical correlations.

Shapes: N rows, P numbers of one side, Q of the other, C canonical directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ROUNDING = 1e-7  # of the largest singular value: rows are fp32


@dataclass(frozen=True)
class Side:
    """The map of one side into the canonical directions."""

    mean_P: np.ndarray
    map_PC: np.ndarray

    def variates(self, x_NP: np.ndarray) -> np.ndarray:
        """[N, C]: over the rows of the fit they have the mean 0, no correlation with each other, and without a ridge
        the sum of squares 1."""
        return (x_NP - self.mean_P) @ self.map_PC


@dataclass(frozen=True)
class LinearCCA:
    """``correlations_C`` fall."""

    first: Side
    second: Side
    correlations_C: np.ndarray

    def embedded(self, rows: np.ndarray, second: bool = False) -> np.ndarray:
        """Unit rows [N, C] of one side, to compare with those of the other: the variates, each times its correlation,
        so that directions that say nothing of the other side do not count (Gong et al., IJCV 2014)."""
        found_NC = (self.second if second else self.first).variates(rows) * self.correlations_C
        length_N1 = np.linalg.norm(found_NC, axis=1, keepdims=True)
        return found_NC / np.maximum(length_N1, np.finfo(np.float64).tiny)


def fit(x_NP: np.ndarray, y_NQ: np.ndarray, ridges: tuple[float, float] = (0.0, 0.0)) -> LinearCCA:
    """Of N aligned rows. Directions without variance take no part."""
    mean_P, basis_NA, back_PA = _whitened(x_NP, ridges[0])
    mean_Q, basis_NB, back_QB = _whitened(y_NQ, ridges[1])
    u_AC, correlations_C, vt_CB = np.linalg.svd(basis_NA.T @ basis_NB, full_matrices=False)
    return LinearCCA(Side(mean_P, back_PA @ u_AC), Side(mean_Q, back_QB @ vt_CB.T), correlations_C)


def _whitened(x_NP: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean, the white rows [N, A], and the map [P, A] of centred rows to them."""
    x_NP = x_NP.astype(np.float64)
    mean_P = x_NP.mean(axis=0)
    u_NA, values_A, vt_AP = np.linalg.svd(x_NP - mean_P, full_matrices=False)
    kept = values_A > ROUNDING * max(values_A.max(initial=0.0), np.abs(x_NP).max(initial=0.0))
    u_NA, values_A, vt_AP = u_NA[:, kept], values_A[kept], vt_AP[kept]
    scale_A = 1 / np.sqrt(values_A**2 + ridge * np.mean(np.pad(values_A**2, (0, x_NP.shape[1] - len(values_A)))))
    return mean_P, u_NA * (values_A * scale_A), vt_AP.T * scale_A
