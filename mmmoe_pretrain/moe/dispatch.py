"""Dispatchers: they take tokens to their experts and bring the results back.

A router decides, an expert computes; a dispatcher only moves. Both dispatchers have one interface
and give the same result. A *slot* is the place of an expert in the order (rank, local index); slot
E means that the assignment goes nowhere (dropped, or an expert without computation).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mmmoe_pretrain.config_moe import MoEConfig
from mmmoe_pretrain.moe.all_to_all import AllToAllDispatcher
from mmmoe_pretrain.moe.plan import Compute, plan_of_slots, sort_slots
from mmmoe_pretrain.parallel.groups import Groups

Meanwhile = Callable[[], Tensor]


class Dispatcher(Protocol):
    def run(
        self, x_nD: Tensor, slots_nK: Tensor, weights_nK: Tensor, compute: Compute, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The weighted sum of each token's experts [n, D], and what ``meanwhile`` returned; it is
        called while tokens travel."""
        ...


@dataclass(frozen=True)
class LocalDispatcher:
    """All experts live in this process: sorting is all there is to do."""

    num_slots: int

    def run(
        self, x_nD: Tensor, slots_nK: Tensor, weights_nK: Tensor, compute: Compute, meanwhile: Meanwhile | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See ``Dispatcher``."""
        order, place, counts = sort_slots(slots_nK, self.num_slots)
        plan = plan_of_slots(order, place, counts.tolist(), slots_nK.shape[1])
        weights_A = weights_nK.reshape(-1).index_select(0, order[: plan.num_assignments])
        return compute(x_nD, weights_A, plan), meanwhile() if meanwhile else None


def make_dispatcher(config: MoEConfig, groups: Groups) -> Dispatcher:
    """Local where this process holds every expert, else all-to-all."""
    if groups.expert_size == 1:
        return LocalDispatcher(config.num_experts)
    return AllToAllDispatcher(config.num_experts, groups, config.dispatch_chunks)
