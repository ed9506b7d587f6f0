"""Gaussians with diagonal covariance: densities, divergences, products and mixtures of them, and bounds of a
likelihood by draws of them. For objectives with latent variables; pure functions of tensors.

Shapes: L latent numbers, the last dimension; K components, the first one of a mixture; M experts, the last but one of
a product; N and G samples; ``...`` any others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)
NEVER = -1e30  # a log-probability that counts for nothing; finite, so that a row without any has a gradient of zero


@dataclass(frozen=True)
class Gaussian:
    """``mean`` and ``scale`` (standard deviations), both [..., L]."""

    mean: Tensor
    scale: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """The draw that ``noise`` from N(0, 1) becomes, with a gradient (arXiv 1312.6114)."""
        return self.mean + self.scale * noise

    def log_prob_each(self, value: Tensor) -> Tensor:
        """[..., L]: in nats, of each number."""
        return -0.5 * (((value - self.mean) / self.scale).square() + LOG_2PI) - self.scale.log()

    def log_prob(self, value: Tensor) -> Tensor:
        """[...]: in nats."""
        return self.log_prob_each(value).sum(dim=-1)

    def kl(self, other: Gaussian) -> Tensor:
        """[...]: KL(self || other), in nats."""
        ratio, distance = self.scale / other.scale, (self.mean - other.mean) / other.scale
        return 0.5 * (ratio.square() + distance.square() - 1 - 2 * ratio.log()).sum(dim=-1)


def standard(like: Tensor) -> Gaussian:
    """N(0, 1) of numbers like these."""
    return Gaussian(torch.zeros_like(like), torch.ones_like(like))


def product(experts: Gaussian, chosen: Tensor) -> Gaussian:
    """The normalised product of the ``chosen``, bool [..., M], of the experts [..., M, L]: precisions add up (Hinton
    2002; arXiv 1802.05335). N(0, 1) where none is."""
    precision = experts.scale.square().reciprocal() * chosen[..., None]
    total = precision.sum(dim=-2)
    total = torch.where(chosen.any(dim=-1)[..., None], total, 1.0)
    return Gaussian((precision * experts.mean).sum(dim=-2) / total, total.rsqrt())


def mixture_log_prob(components: Gaussian, valid: Tensor, value: Tensor) -> Tensor:
    """[...] of ``value`` [..., L], in nats: the density of the equal mixture of the ``valid``, bool [K, ...], of the
    components [K, ..., L], which broadcast to it."""
    each = components.log_prob(value).masked_fill(~valid, NEVER)
    return torch.logsumexp(each, dim=0) - valid.sum(dim=0).clamp(min=1).to(value.dtype).log()


def total_correlation(value_NL: Tensor, atoms: Gaussian, valid_G: Tensor) -> Tensor:
    """[N]: log q(z) - sum over l of log q(z_l), whose mean over draws ``value_NL`` is the total correlation of the
    aggregated posterior q, in nats. q is estimated as the mean of the posteriors ``atoms`` [G, L] of the ``valid_G``
    (minibatch weighted sampling of beta-TCVAE, arXiv 1802.04942, which divides by the size of the data set instead:
    another constant, the same gradient)."""
    each_NGL = atoms.log_prob_each(value_NL[:, None]).masked_fill(~valid_G[None, :, None], NEVER)
    count = valid_G.sum().clamp(min=1).to(value_NL.dtype).log()
    joint_N = torch.logsumexp(each_NGL.sum(dim=-1), dim=1) - count
    return joint_N - (torch.logsumexp(each_NGL, dim=1) - count).sum(dim=-1)


@dataclass(frozen=True)
class Bounds:
    """Lower bounds of a log-likelihood, in nats: the evidence lower bound, and the importance-weighted one of as many
    draws (IWAE, arXiv 1509.00519), which is never below it in expectation and rises with their number."""

    elbo: Tensor
    importance: Tensor

    @classmethod
    def of(cls, log_weight: Tensor, valid: Tensor) -> Bounds:
        """``log_weight`` [draws, K, ...]: log p(x, z) - log q(z) of draws of each component of a posterior q, whose
        ``valid`` ones, bool [K, ...], are equal parts of it; a draw of each stands for the same share of q
        (MMVAE, arXiv 1911.03393)."""
        number = (log_weight.shape[0] * valid.sum(dim=0).clamp(min=1)).to(log_weight.dtype)
        elbo = torch.where(valid, log_weight, 0.0).sum(dim=(0, 1)) / number
        shown = log_weight.masked_fill(~valid, NEVER).flatten(0, 1)
        return cls(elbo, torch.logsumexp(shown, dim=0) - number.log())
