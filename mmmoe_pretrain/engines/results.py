"""What a step reports: losses and routing from the microbatches, stages and ranks that had a part in it, and
whether all of them can go on from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist

from mmmoe_pretrain.models.pretraining import LossReport
from mmmoe_pretrain.parallel.collectives import group_size
from mmmoe_pretrain.parallel.groups import Groups


def step_losses(
    reports: Sequence[LossReport], names: Sequence[str], groups: Groups, device: torch.device
) -> dict[str, float]:
    """The losses of a step by name, and their ``total``: sums over the stages and microbatches of means over the
    data-parallel ranks. Equal on every rank of the job, but for the last bit, since groups of ranks may add up in
    another order.

    ``reports``: of every stage of this rank, with sums over the microbatches (``add_reports``). ``names``: every
    loss of the model.
    """
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    for report in reports:
        for i, name in enumerate(names):
            if name in report.losses:
                sums[i] += report.losses[name]
    for group in (groups.data, groups.pipeline):
        if group_size(group) > 1:
            dist.all_reduce(sums, group=group)
    losses = {name: value / groups.data_size for name, value in zip(names, sums.tolist(), strict=True)}
    return {"total": sum(losses.values()), **losses}


def add_reports(sums: LossReport | None, report: LossReport) -> LossReport:
    """Sums over the microbatches of one stage, made as they come: a layer's co-activation alone has [M, E, E]
    numbers. Losses add up in fp64. Routing is over all data-parallel ranks already."""
    losses = {name: loss.double() for name, loss in report.losses.items()}
    if sums is None:
        return LossReport(losses, report.routing)
    routing = tuple(a + b for a, b in zip(sums.routing, report.routing, strict=True))
    return LossReport({name: sums.losses[name] + loss for name, loss in losses.items()}, routing)


def finite_everywhere(numbers: Sequence[float], groups: Groups, device: torch.device) -> bool:
    """Are the numbers of every rank of the job finite? The same answer on all of them."""
    bad = torch.tensor(float(not all(map(math.isfinite, numbers))), device=device)
    for group in (groups.tensor, groups.data, groups.pipeline):
        if group_size(group) > 1:
            dist.all_reduce(bad, op=dist.ReduceOp.MAX, group=group)
    return not bool(bad)
