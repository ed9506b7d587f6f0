"""What a step reports: losses and routing from the microbatches, stages and ranks that had a part in it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import torch
import torch.distributed as dist

from mmmoe_pretrain.batch import Batch
from mmmoe_pretrain.models.pretraining import LossReport
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.collectives import group_size
from mmmoe_pretrain.parallel.groups import Groups


def mean_losses(
    reports: Sequence[LossReport],
    names: Sequence[str],
    batches: Sequence[Batch],
    groups: Groups,
    device: torch.device,
) -> tuple[dict[str, float], int]:
    """Losses by name, and ``total``: sums over the stages of means over microbatches and data-parallel
    ranks. And the valid tokens of all microbatches and ranks. Equal on every rank of the job.

    ``reports``: of every microbatch and every stage of this rank. ``names``: every loss of the model.
    """
    sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
    for report in reports:
        for i, name in enumerate(names):
            if name in report.losses:
                sums[i] += report.losses[name]
    sums[:-1] /= len(batches)
    if groups.pipeline_rank == 0:
        sums[-1] = sum(batch.num_valid for batch in batches)
    for group in (groups.data, groups.pipeline):
        if group_size(group) > 1:
            dist.all_reduce(sums, group=group)
    *totals, tokens = sums.tolist()
    losses = {name: value / groups.data_size for name, value in zip(names, totals, strict=True)}
    return {"total": sum(losses.values()), **losses}, round(tokens)


def add_routing(reports: Sequence[tuple[RoutingStats, ...]]) -> tuple[RoutingStats, ...]:
    """Sums over the microbatches of one stage; each report is over all data-parallel ranks already."""
    layers = []
    for stats in zip(*reports, strict=True):
        layers.append(functools.reduce(operator.add, [layer.detach() for layer in stats]))
    return tuple(layers)
