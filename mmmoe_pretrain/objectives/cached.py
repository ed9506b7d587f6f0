"""The contrastive loss of a whole optimizer step, whose microbatches together need not fit in memory
(GradCache, arXiv 2101.06983).

The step runs twice. Pass 1, without gradients: ``collect`` the features of each microbatch. ``finish``
computes the loss of all of them, over all data-parallel ranks, and its gradient for each feature. Pass 2,
with gradients: ``surrogate`` takes the loss's place in each microbatch, and gives features and
temperatures that gradient. It is exact, as long as both passes compute the same features: what is random
in routing has to begin again with ``begin_step`` in between.

Shapes: B samples of a microbatch, N microbatches, M modalities, P size of the joint space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmmoe_pretrain.batch import MODALITIES
from mmmoe_pretrain.objectives.contrastive import ContrastiveObjective
from mmmoe_pretrain.parallel.groups import Groups


@dataclass(frozen=True)
class _Microbatch:
    features_BMP: Tensor
    present_MB: Tensor
    group_ids_B: Tensor


@dataclass(frozen=True)
class _Gradients:
    """Of the weighted loss: for each microbatch's features, and a microbatch's share for each pair's temperature."""

    features_BMP: tuple[Tensor, ...]
    log_scales: dict[str, tuple[Tensor, Tensor]]  # by pair: the parameter, its gradient


class ContrastiveCache:
    """Of one optimizer step: ``collect`` N times, ``finish``, then ``surrogate`` N times.

    Ranks may cut their samples into unlike microbatches, but each must have as many samples in all, as
    ``collectives.gather_rows`` asks. Under pipelining the last stage alone has one.
    """

    def __init__(self) -> None:
        self._seen: list[_Microbatch] = []
        self._gradients: _Gradients | None = None

    def collect(self, features: dict[str, Tensor], present_MB: Tensor, group_ids: Tensor) -> None:
        """The next microbatch of pass 1; ``features[m]``: [B, P]."""
        assert self._gradients is None, "collect after finish: a cache is of one step"
        self._seen.append(_Microbatch(_stack(features).detach(), present_MB, group_ids))

    def finish(
        self, objective: ContrastiveObjective, groups: Groups, factors: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Between the passes: of each pair a microbatch's share of what ``objective`` sums over all that was
        collected. The sum of each pair times its factor is this rank's loss. No parameter gets a gradient here."""
        features = [seen.features_BMP.requires_grad_() for seen in self._seen]
        present_MB = torch.cat([seen.present_MB for seen in self._seen], dim=1)
        group_ids = torch.cat([seen.group_ids_B for seen in self._seen])
        scales, count = dict(objective.log_scale.items()), len(features)
        with torch.enable_grad():
            all_BMP = torch.cat(features)
            named = {name: all_BMP[:, m] for m, name in enumerate(MODALITIES)}
            sums = objective(named, present_MB, group_ids, groups)
            total = torch.stack([factors[pair] * value for pair, value in sums.items()]).sum()
            found = torch.autograd.grad(total, [*features, *scales.values()])
        of_features, of_scales = found[:count], found[count:]
        self._gradients = _Gradients(
            of_features,
            {pair: (scale, grad / count) for (pair, scale), grad in zip(scales.items(), of_scales, strict=True)},
        )
        self._seen = []
        return {pair: value.detach() / count for pair, value in sums.items()}

    def surrogate(self, index: int, features: dict[str, Tensor]) -> Tensor:
        """Microbatch ``index`` of pass 2, [B, P] by modality: a scalar of value 0 that takes the place of
        the weighted contrastive losses.

        Its sum over the N microbatches has the gradient of this rank's loss: a feature's comes from its own
        microbatch, and a temperature's from each in equal parts, since engines may wait for it in each.
        """
        assert self._gradients is not None, "surrogate before finish"
        total = (_stack(features) * self._gradients.features_BMP[index]).sum()
        for scale, grad in self._gradients.log_scales.values():
            total = total + (scale * grad).sum()
        return total - total.detach()


def _stack(features: dict[str, Tensor]) -> Tensor:
    """[B, M, P] in fp32."""
    return torch.stack([features[name].float() for name in MODALITIES], dim=1)
