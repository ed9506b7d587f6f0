"""Loss weights that are learned from the losses' own sizes: homoscedastic uncertainty (arXiv 1705.07115).

Loss i counts ``exp(-s_i)`` times, and ``s_i / 2`` is added, where s_i is the logarithm of a learned variance: a loss
that stays large counts less. Its weight in the config is a further factor. Held-out losses have the config's alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class UncertaintyWeighting(nn.Module):
    """A log variance for each of the ``losses``, under its name with ``-`` for ``/``."""

    def __init__(self, losses: Iterable[str]) -> None:
        super().__init__()
        self.log_variance = nn.ParameterDict({_key(loss): nn.Parameter(torch.zeros(1)) for loss in losses})

    def factor(self, loss: str) -> Tensor:
        """A scalar: the learned weight of a loss."""
        return self.log_variance[_key(loss)].neg().exp().squeeze(0)

    def penalty(self, losses: Iterable[str], share: float) -> Tensor:
        """A scalar: what is added for these losses, for a ``share`` of the step; shares sum to 1 over its
        microbatches, in the mean over ranks. All parameters are in its graph."""
        counted = set(map(_key, losses))
        terms = [0.5 * share * (key in counted) * value for key, value in self.log_variance.items()]
        return torch.cat(terms).sum()


WEIGHTING = "weighting"  # the name of what is added to the losses


def _key(loss: str) -> str:
    return loss.replace("/", "-")  # no other loss has this key: names have no -
