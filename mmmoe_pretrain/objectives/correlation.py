"""What objectives of correlations share: their settings, and whitened vectors.

A correlation is over all samples at once, so these losses are no means over samples. The loss of a scope (a global
microbatch, or with ``cached`` the step) stands for each of its samples, and the loss of a step is the mean over its
samples. The vectors are the projections before they get unit length: a length that is fixed is a constraint that
linear maps, of which correlations are, cannot undo.

All of it is in fp64: covariances square the condition of the vectors. Whitening is by Cholesky, and singular and
eigenvectors are constants for the gradient, which needs no derivative of them: that of a sum of singular values is
exactly U V', and that of a sum of the largest eigenvalues W W', however close to each other the values are.

Shapes: N samples of the scope, P numbers in a representation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmmoe_pretrain.config.base import ModalitySettings, StepSizes
from mmmoe_pretrain.kinds import nearest
from mmmoe_pretrain.objectives.base import Outputs
from mmmoe_pretrain.objectives.pooled import CachedSettings, PooledModule, PooledSettings

Ridge = Annotated[float, Field(ge=1e-8, le=10)]
FP32_ROUNDING = 1e-12  # of the mean square: a variance below it is rounding
NO_CORRELATION = 1e-9  # a singular value below it is rounding of fp64


class CorrelationSettings(PooledSettings, CachedSettings):
    """``ridge``: added to the variance in every direction, as a part of the mean variance of the representation; one
    number, or one for each representation by name."""

    ridge: Ridge | dict[str, Ridge] = 1e-3

    def check_names(
        self, name: str, modalities: Mapping[str, ModalitySettings], representations: Mapping[str, tuple[str, ...]]
    ) -> None:
        """See ``ObjectiveSettings.check_names``."""
        super().check_names(name, modalities, representations)
        if not isinstance(self.ridge, dict):
            return
        read = dict.fromkeys(self.named)
        for key in self.ridge:
            if key not in read:
                raise ValueError(f"objectives.{name}.ridge {key!r}: {nearest(key, read, 'the objective reads')}")
        if missing := [key for key in read if key not in self.ridge]:
            raise ValueError(
                f"objectives.{name}.ridge has none of {', '.join(missing)}; add it, or give one number for all"
            )

    def ridge_of(self, representation: str) -> float:
        """That of ``representation``."""
        return self.ridge[representation] if isinstance(self.ridge, dict) else self.ridge

    def batch_problem(self, name: str, sizes: StepSizes) -> str | None:
        """See ``ObjectiveSettings.batch_problem``."""
        parts, least = 1 if self.cached else sizes.num_microbatches, sizes.embedding_size + 1
        samples = sizes.global_batch_size // parts
        if not self.on or samples >= least:
            return None
        remedies = [f"train.global_batch_size {least * parts} or more"]
        if parts > 1 and sizes.global_batch_size >= least:
            remedies.append(f"objectives.{name}.cached: true (correlations of the whole step)")
            fewer = [n for n in sizes.legal_microbatches if sizes.global_batch_size // n >= least]
            remedies += [f"train.num_microbatches {fewer}"] if fewer else []
        remedies += [f"model.embedding_size {samples - 1} or less"] if samples > 2 else []
        return (
            f"objectives.{name} correlates {sizes.embedding_size} dimensions (model.embedding_size) over {samples} "
            f"samples, which any vectors do perfectly: it needs {least} or more; use "
            f"{', '.join(remedies)}, or objectives.{name}.weight: 0"
        )


class CorrelationModule(PooledModule):
    """Reads projections; has no parameters."""

    def vectors(self, outputs: Outputs) -> Mapping[str, Tensor]:
        """See ``PooledModule.vectors``."""
        return outputs.projected


def of_each_sample(loss: Tensor, counted_N: Tensor, counted_B: Tensor) -> Tensor:
    """The sum over this rank's samples ``counted_B`` of the ``loss`` of all ``counted_N``; 0 where these are fewer
    than two, which have no correlation."""
    none = torch.zeros_like(loss)
    return (torch.where(counted_N.sum() >= 2, loss, none) * counted_B.sum()).float()


def centred(x_NP: Tensor, counted_N: Tensor) -> Tensor:
    """The rows that are counted, in fp64, without their mean; the others are zero."""
    counted_N1 = counted_N[:, None]
    x_NP = torch.where(counted_N1, x_NP.double(), 0.0)
    mean_P = x_NP.sum(dim=0) / counted_N.sum().clamp(min=1)
    return torch.where(counted_N1, x_NP - mean_P, 0.0)


def whitened(x_NP: Tensor, counted_N: Tensor, ridge: float) -> Tensor:
    """Z = X inv(L)', where X is centred and L L' = X'X + ``ridge`` of its mean diagonal. Without a ridge Z'Z = I.

    The ridge follows the size of X, so a longer X is no way around it. No variance is below rounding, so a constant X
    gives zero.
    """
    rows_NP = centred(x_NP, counted_N)
    size = rows_NP.shape[1]
    squares = torch.where(counted_N[:, None], x_NP.double(), 0.0).square().sum() / size
    least = ridge * rows_NP.square().sum() / size + FP32_ROUNDING * squares + 1e-30
    identity = torch.eye(size, dtype=rows_NP.dtype, device=rows_NP.device)
    # cholesky_ex: vectors that are not finite give a loss that is not, and the step is skipped.
    lower_PP, _ = torch.linalg.cholesky_ex(rows_NP.t() @ rows_NP + least * identity)
    return torch.linalg.solve_triangular(lower_PP, rows_NP.t(), upper=False).t()


def sum_of_singular_values(x: Tensor) -> Tensor:
    """Of a square matrix. Where one is 0 the gradient is the least of the subgradients."""
    with torch.no_grad():
        u, values, vh = torch.linalg.svd(torch.nan_to_num(x, posinf=0.0, neginf=0.0))
        direction = (u * (values > NO_CORRELATION)) @ vh
    return (direction * x).sum()


def sum_of_largest_eigenvalues(z_NQ: Tensor, count: int) -> Tensor:
    """The ``count`` largest of Z Z', which are those of Z'Z."""
    with torch.no_grad():
        _, vectors_QQ = torch.linalg.eigh(torch.nan_to_num(z_NQ.t() @ z_NQ, posinf=0.0, neginf=0.0))
        largest_QC = vectors_QQ[:, -count:]
    return (z_NQ @ largest_QC).square().sum()
