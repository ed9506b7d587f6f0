"""Gradients of each task alone: how far they conflict, and one remedy, PCGrad (arXiv 2001.06782).

An engine runs a step once for each task, by its normal schedule, so what is compared are global gradients: summed
over microbatches and data-parallel ranks, of the parameters that all tasks share. Of these a rank holds some, and
tensor ranks hold some twice; inner products count each element once. All that PCGrad does to gradients follows from
their inner products, since a projection of g_i is a sum of the g_k: ``pcgrad`` finds one weight for each task, and
every rank adds up what it holds.

Shapes: T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mmmoe_pretrain.parallel.collectives import group_size
from mmmoe_pretrain.parallel.groups import Group, Groups

AT_ONCE = 1 << 22  # numbers of a gradient that are multiplied at once, in fp64


@dataclass(frozen=True)
class Gradients:
    """The reduced gradients by which this rank's optimizer steps, in the same order after each pass. ``shared``:
    whether all tasks share the parameter. ``counted``: places of those that this rank counts in inner products, and
    the groups to sum over, one after the other; as many entries on every rank."""

    tensors: list[Tensor]
    shared: list[bool]
    counted: list[tuple[list[int], tuple[Group, ...]]]


@dataclass
class TaskGradients:
    """The gradients of the passes of a step. ``seed``: of the orders in which PCGrad projects."""

    groups: Groups
    device: torch.device
    combine: str  # train.task_gradients.combine
    seed: tuple[int, int]
    _tasks: list[str] = field(default_factory=list)
    _kept: list[list[Tensor]] = field(default_factory=list)  # of each task, those of shared parameters
    _rest: list[Tensor] = field(default_factory=list)  # the sum of all others

    @torch.no_grad()
    def add(self, task: str | None, found: Gradients) -> None:
        """After a pass: of ``task`` alone, or what belongs to none."""
        if not self._rest:
            self._rest = [torch.zeros_like(tensor) for tensor in found.tensors]
        kept = []
        for rest, tensor, shared in zip(self._rest, found.tensors, found.shared, strict=True):
            if shared and task is not None:
                kept.append(tensor.clone())
            else:
                rest.add_(tensor)
        if task is not None:
            self._tasks.append(task)
            self._kept.append(kept)

    @torch.no_grad()
    def combined(self, found: Gradients) -> dict[str, Tensor]:
        """After the last pass: the gradients of the step are written to ``found``. Returns the cosine of every two
        tasks that have gradients. The host waits for the inner products. Collective."""
        gram_TT = self._inner_products(found).cpu().numpy()
        weights = np.ones(len(self._tasks))
        if self.combine == "pcgrad" and np.isfinite(gram_TT).all():  # else the step is skipped
            weights = pcgrad(gram_TT, np.random.default_rng(self.seed))
        for place, kept in zip(np.flatnonzero(found.shared).tolist(), zip(*self._kept, strict=True), strict=True):
            for weight, tensor in zip(weights.tolist(), kept, strict=True):
                self._rest[place].add_(tensor, alpha=weight)
        for tensor, total in zip(found.tensors, self._rest, strict=True):
            tensor.copy_(total)
        found_cosines = cosines(gram_TT, self._tasks)
        return {name: torch.tensor([value], device=self.device) for name, value in found_cosines.items()}

    def _inner_products(self, found: Gradients) -> Tensor:
        """[T, T] in fp64, equal on every rank of the job."""
        count, places = len(self._tasks), {place: i for i, place in enumerate(np.flatnonzero(found.shared).tolist())}
        total = torch.zeros(count, count, dtype=torch.float64, device=self.device)
        for counted, groups in found.counted:
            part = torch.zeros_like(total)
            for place in counted:
                if place in places:
                    part += _products([kept[places[place]] for kept in self._kept])
            for group in groups:
                if group_size(group) > 1:
                    dist.all_reduce(part, group=group)
            total += part
        # Sums of different groups may differ in the last bit, and weights must not.
        for group in (self.groups.tensor, self.groups.data, self.groups.pipeline):
            if group_size(group) > 1:
                dist.all_reduce(total, op=dist.ReduceOp.MAX, group=group)
        return total


def _products(rows: Sequence[Tensor]) -> Tensor:
    parts = [row.reshape(-1).split(AT_ONCE) for row in rows]
    products = []
    for some in zip(*parts, strict=True):
        stacked_Tn = torch.stack(some).double()
        products.append(stacked_Tn @ stacked_Tn.t())
    return torch.stack(products).sum(dim=0)


def pcgrad(gram_TT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The weight of each task's gradient in the sum of the projected ones (algorithm 1): g_i loses its component
    along each g_j that it conflicts with (a negative inner product), one after the other in random order."""
    count = len(gram_TT)
    weights_TT = np.eye(count)  # row i: g_i after its projections, as a sum of the gradients
    for i in range(count):
        for j in rng.permutation(count).tolist():
            product = float(weights_TT[i] @ gram_TT[:, j])
            if j != i and product < 0 < gram_TT[j, j]:
                weights_TT[i, j] -= product / gram_TT[j, j]
    return weights_TT.sum(axis=0)


def cosines(gram_TT: np.ndarray, tasks: Sequence[str]) -> dict[str, float]:
    """``conflict/A-B`` of every two: below 0, what helps one hurts the other."""
    found = {}
    for i, one in enumerate(tasks):
        for j in range(i + 1, len(tasks)):
            lengths = math.sqrt(max(0.0, gram_TT[i, i])) * math.sqrt(max(0.0, gram_TT[j, j]))
            if lengths > 0 and math.isfinite(lengths):
                found[f"conflict/{one}-{tasks[j]}"] = float(gram_TT[i, j] / lengths)
    return found
