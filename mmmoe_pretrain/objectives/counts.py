"""What the losses of an optimizer step are divided by, known on the host before its first forward pass.

An objective's loss is a sum over its terms (the targets of captioning, the samples that have both modalities of a
contrastive pair) divided by their number in the step, over all microbatches and data-parallel ranks. So the cut of a
step into microbatches and ranks weighs no term more than another, and a microbatch without any takes no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.config import ObjectivesConfig
from mmmoe_pretrain.objectives.captioning import num_targets
from mmmoe_pretrain.objectives.contrastive import num_pairs
from mmmoe_pretrain.parallel.collectives import group_size
from mmmoe_pretrain.parallel.groups import Group

CAPTIONING, CONTRASTIVE = "captioning", "contrastive/"  # a loss's name, and what comes before a pair


@dataclass(frozen=True)
class StepCounts:
    """Over all microbatches and data-parallel ranks of a step. ``terms``: of each objective's loss, by its name."""

    tokens: int  # padding not counted
    terms: dict[str, int]


def loss_weights(config: ObjectivesConfig) -> dict[str, float]:
    """Every loss of the objectives by name, in a fixed order, with its weight in the total."""
    weights: dict[str, float] = {}
    if config.contrastive.on:
        pairs = sorted(config.contrastive.pairs.items())
        weights |= {CONTRASTIVE + pair: config.contrastive.weight * weight for pair, weight in pairs}
    if config.captioning.weight > 0:
        weights[CAPTIONING] = config.captioning.weight
    return weights


def step_counts(batches: Sequence[Batch], config: ObjectivesConfig, group: Group, device: torch.device) -> StepCounts:
    """Of a step whose microbatches on this rank are ``batches``, by one small reduction over the data-parallel ranks
    in ``group``, all of which must call it; the same on every pipeline stage, each of which has the batches."""
    names = list(loss_weights(config))
    counts = [sum(batch.num_valid for batch in batches)]
    counts += [sum(_terms(name, batch) for batch in batches) for name in names]
    if group_size(group) > 1:
        sums = torch.tensor(counts, device=device)
        dist.all_reduce(sums, group=group)
        counts = sums.tolist()
    return StepCounts(counts[0], dict(zip(names, counts[1:], strict=True)))


def _terms(name: str, batch: Batch) -> int:
    return num_targets(batch) if name == CAPTIONING else num_pairs(batch, name.removeprefix(CONTRASTIVE))
