"""Posteriors of latent numbers by subsets of a sample's modalities, of the Gaussians (experts) of each modality.

Shapes: B samples, M modalities, Q passes (one for each subset), L shared latent numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmmoe_pretrain.objectives.gaussians import Gaussian, mixture_log_prob, product


@dataclass(frozen=True)
class Posterior:
    """``shared`` [Q, B, L]: of the subset [Q, B, M] of a sample's modalities, where ``valid`` [Q, B]. ``private`` by
    modality, [B, its size]. ``condition`` [B, its size], which decoders see."""

    shared: Gaussian
    subset: Tensor
    valid: Tensor
    private: dict[str, Gaussian]
    prior: Gaussian
    condition: Tensor

    @property
    def weight(self) -> Tensor:
        """[Q, B]: one in all for each sample that has a valid pass."""
        return self.valid / self.valid.sum(dim=0).clamp(min=1)

    @property
    def first(self) -> Posterior:
        """The first pass alone."""
        shared = Gaussian(self.shared.mean[:1], self.shared.scale[:1])
        return replace(self, shared=shared, subset=self.subset[:1], valid=self.valid[:1])

    def log_prob(self, z_QBL: Tensor) -> Tensor:
        """[Q, B]: the density of each under the equal mixture of all valid passes, in nats."""
        components = Gaussian(self.shared.mean[:, None], self.shared.scale[:, None])
        return mixture_log_prob(components, self.valid[:, None], z_QBL)


def posteriors(
    experts: Gaussian,
    prior: Gaussian,
    subset_QM: Tensor,
    seen_BM: Tensor,
    random_QBM: Tensor | None,
    of_a_product: bool,
) -> tuple[Gaussian, Tensor, Tensor]:
    """[Q, B, L] of the ``experts`` [B, M, L] that a sample has, ``seen_BM``, of each subset; the subsets [Q, B, M]
    and whether each counts, [Q, B]. ``of_a_product``: the ``prior`` [B, L] is an expert, too; a subset has what is
    seen of it, and ``random_QBM`` are more of them. Else a subset counts if all of it is seen."""
    subset_QBM = subset_QM[:, None] & seen_BM
    if not of_a_product:
        return product(experts, subset_QBM), subset_QBM, (subset_QBM == subset_QM[:, None]).all(dim=-1)
    if random_QBM is not None:
        subset_QBM = torch.cat([subset_QBM, random_QBM & seen_BM])
    mean, scale = (
        torch.cat([of_expert, of_prior[:, None]], dim=1)
        for of_expert, of_prior in ((experts.mean, prior.mean), (experts.scale, prior.scale))
    )
    with_prior_QBM = torch.cat([subset_QBM, torch.ones_like(subset_QBM[..., :1])], dim=-1)
    return product(Gaussian(mean, scale), with_prior_QBM), subset_QBM, subset_QBM.any(dim=-1)
