"""Balanced progress of the parts of a fused representation: on-the-fly gradient modulation with generalisation
enhancement (OGM-GE, arXiv 2203.15332). The part that is ahead learns more slowly, so that the others catch up.

A fused vector is a sum of one term a part (``Additive``), and so is its product with another vector, the score. What
part u alone would answer is the softmax over the candidates of its share of the scores (``PairModule.progress``); s_u
is the mean probability that it gives to the true other side, over all samples of a step that have every part. Then

    rho_u = s_u / mean of the other parts' s,    k_u = 1 - tanh(alpha * rho_u) if rho_u > 1, else 1.

Of two parts this is the paper's; for more it compares with the mean. The paper multiplies the gradient of the encoder
of modality u by k_u. Here the trunk is shared, so k_u multiplies the gradient that flows from the fused vector into
the pooled vector of part u, and through it reaches all that made that vector: the trunk's share of it, and the
embedder. The fusion's and the head's own weights, and other losses of the modality, keep their gradient.

s is that of the last step that changed weights, over all its microbatches and data-parallel ranks, where the paper
takes the microbatch's own: a step then has one k, however it is split. In the first step k is 1.

With ``noise`` each sample's gradient into part u is multiplied by k_u + xi, xi drawn from N(0, 1) for each sample and
part. The sum over samples of xi times a sample's gradient is Gaussian with the covariance of the gradients of samples
(uncentred, of the batch): the paper's h(theta), which restores the noise that k_u takes away. xi follows from the
seed, the step, the names and the sample, so it is the same under every layout.

Shapes: B samples, P parts, D hidden size, W of the result.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmmoe_pretrain.batch import Batch, Spans, send
from mmmoe_pretrain.config.base import RepresentationSettings, StrictModel
from mmmoe_pretrain.models.fusion.base import Fusion

HALF_UNIT = 2.0**-32


class ModulationSettings(StrictModel):
    """``alpha``: how strongly a part that is ahead is held back; 0 only measures. ``noise``: see the module."""

    alpha: float = Field(0.3, ge=0)
    noise: bool = False


class AdditiveSettings(RepresentationSettings):
    """``modulation``: the gradients of the parts are balanced (OGM-GE); None: they are not."""

    modulation: ModulationSettings | None = None

    @property
    def modulated(self) -> bool:
        """See ``RepresentationSettings.modulated``."""
        return self.modulation is not None

    def of_the_model(self) -> dict[str, Any]:
        """See ``RepresentationSettings.of_the_model``; how strong it is may change."""
        return {**super().of_the_model(), "modulation": self.modulated}


class Additive(Fusion):
    """A fusion whose result is a sum of one term a part."""

    @abc.abstractmethod
    def terms(self, mean_PBD: Tensor, present_PB: Tensor) -> Tensor:
        """[P, B, W], of the means alone."""

    def forward(
        self,
        x_nD: Tensor,
        mean_PBD: Tensor,
        present_PB: Tensor,
        spans_P: tuple[Spans, ...],
        by_part: bool = False,
    ) -> Tensor:
        """See ``Fusion.forward``; ``by_part``: the terms instead of their sum."""
        terms_PBW = self.terms(mean_PBD, present_PB)
        return terms_PBW if by_part else terms_PBW.sum(dim=0)


class Modulation(nn.Module):
    """The scores of the parts in the last step, which are saved, and what follows from them."""

    def __init__(self, name: str, settings: RepresentationSettings) -> None:
        super().__init__()
        assert isinstance(settings, AdditiveSettings) and settings.modulation is not None
        self.name, self.parts, self.settings = name, settings.parts, settings.modulation
        for part in self.parts:
            self.register_buffer(f"score_{part}", torch.zeros(1))  # 0: none yet
        self._sums: list[Tensor] = []  # [P + 1], by microbatch of the step

    @property
    def scores(self) -> Tensor:
        """[P]: s."""
        return torch.cat([self.get_buffer(f"score_{part}") for part in self.parts])

    @property
    def ratios(self) -> Tensor:
        """[P]: rho; 1 before the first step."""
        score_P = self.scores
        others_P = (score_P.sum() - score_P) / (len(self.parts) - 1)
        return torch.where(others_P > 0, score_P / others_P, 1.0)

    @property
    def coefficients(self) -> Tensor:
        """[P]: k."""
        ratio_P = self.ratios
        return torch.where(ratio_P > 1, 1 - torch.tanh(self.settings.alpha * ratio_P), 1.0)

    def factors(self, batch: Batch, seed: int, step: int) -> Tensor:
        """[P, B]: of the gradient of each part of each sample."""
        factor_PB = self.coefficients[:, None].expand(-1, len(batch.metas))
        if not self.settings.noise:
            return factor_PB
        keys = [sample.identity for sample in batch.metas]
        noise_PB = np.stack([normal(keys, f"{seed}/{step}/{self.name}/{part}") for part in self.parts])
        return factor_PB + send(torch.from_numpy(noise_PB), factor_PB.device)

    def add(self, sums: Tensor) -> None:
        """[P + 1]: over the samples of a global microbatch that have every part, the sums of s, and their number."""
        self._sums.append(sums)

    def after_step(self, committed: bool) -> None:
        """The scores are those of the step; of one without such a sample they stay."""
        sums, self._sums = self._sums, []
        if not (committed and sums):
            return
        total = torch.stack(sums).sum(dim=0)
        count = total[-1]
        for part, own in zip(self.parts, total[:-1], strict=True):
            score = self.get_buffer(f"score_{part}")
            score.copy_(torch.where(count > 0, own / count.clamp(min=1), score))

    def figures(self) -> Mapping[str, Tensor]:
        """Of the metrics, [1] by name."""
        found = {"score": self.scores, "ratio": self.ratios, "coefficient": self.coefficients}
        return {
            f"{what}/{self.name}/{part}": value
            for what, values in found.items()
            for part, value in zip(self.parts, values.split(1), strict=True)
        }


def normal(keys: list[str], stream: str) -> np.ndarray:
    """float32: a number from N(0, 1) for each key, a function of it and of ``stream`` (Box and Muller's, of the two
    halves of a hash)."""
    seed = xxhash.xxh3_64_intdigest(stream.encode())
    hashes = np.asarray([xxhash.xxh3_64_intdigest(key.encode(), seed=seed) for key in keys], dtype=np.uint64)
    one, other = ((half + 0.5) * HALF_UNIT for half in hashes[:, None].view(np.uint32).astype(np.float64).T)
    return (np.sqrt(-2 * np.log(one)) * np.cos(2 * np.pi * other)).astype(np.float32)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return grad * factor, None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """x, whose gradient is multiplied by ``factor``, which broadcasts to it."""
    return _ScaleGradient.apply(x, factor)
