"""Experts: stacked weights of this rank, and where each expert of the whole layer lives.

Owns parameters and placement; the arithmetic is in ``expert_math.py``. Knows nothing of routing or
communication. Experts of unlike size (``moe.expert_groups``) form one stack a group; every expert
rank holds an equal share of every group. Tensor ranks hold a share of each expert's hidden size, so
that their results are parts of a sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mmmoe_pretrain.config_moe import MoEConfig
from mmmoe_pretrain.moe.activation import ACTIVATIONS
from mmmoe_pretrain.moe.expert_math import choose_backend
from mmmoe_pretrain.moe.memory import Buffers
from mmmoe_pretrain.moe.plan import ExpertPlan
from mmmoe_pretrain.parallel.cuts import expert_cut, mark_cut, tensor_cut, tensor_share
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.placement import Placement


class Experts(nn.Module):
    """A stack of equal experts; ``local_experts`` are their indices within their group.

    ``up``: [E_local, F, D], or [E_local, 2F, D] with the gate before the up projection (SwiGLU).
    ``down``: [E_local, D, F]; F is this tensor rank's share. Each expert stands as in ``nn.Linear``.
    Both are marked so that the engines reduce their gradients over the replicas of the expert alone.
    """

    def __init__(
        self,
        local_experts: range,
        hidden_size: int,
        expert_hidden_size: int,
        activation: str,
        backend: str,
        groups: Groups = SINGLE,
    ) -> None:
        super().__init__()
        count, share = len(local_experts), tensor_share(expert_hidden_size, groups)
        self._memory = Buffers()
        self.groups = groups
        self.local_experts, self.activation, self.backend = local_experts, activation, backend
        self.recompute = False  # True: the backward pass computes the activations again
        self.up = nn.Parameter(torch.empty(count, ACTIVATIONS[activation].width * share, hidden_size))
        self.down = nn.Parameter(torch.empty(count, hidden_size, share))
        self._mark()

    def _mark(self) -> None:
        for weight in (self.up, self.down):
            weight.allreduce = False  # type: ignore[attr-defined]  # megatron-core's mark of an expert
            mark_cut(weight, self.groups)

    def placements(self) -> dict[str, Placement]:
        experts, blocks = expert_cut(self.groups), ACTIVATIONS[self.activation].width
        return {
            "up": (*experts, *tensor_cut(1, self.groups, blocks)),
            "down": (*experts, *tensor_cut(2, self.groups)),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # copy.deepcopy drops the attributes of a parameter

    def forward(self, x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan) -> Tensor:
        """[m, D] -> [m, D]: each row's experts, weighted and summed."""
        math = choose_backend(self.backend, x_mD, plan, self.up, self.down)
        return math(x_mD, weights_A, plan, self.up, self.down, self.activation, self._memory, self.recompute)


class ExpertGroups(nn.Module):
    """Stacks of unlike size one after another; the plan counts their experts in that order."""

    def __init__(self, stacks: list[Experts]) -> None:
        super().__init__()
        self.stacks = nn.ModuleList(stacks)

    def forward(self, x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan) -> Tensor:
        """See ``Experts.forward``."""
        out_mD, first_expert, start = torch.zeros_like(x_mD), 0, 0
        for stack in self.stacks:
            assert isinstance(stack, Experts)
            counts = plan.counts[first_expert : first_expert + len(stack.local_experts)]
            end = start + sum(counts)
            part = plan.part(start, end, counts)
            out_mD = out_mD + stack(x_mD, weights_A[start:end], part)
            first_expert, start = first_expert + len(counts), end
        return out_mD


class SharedExpert(nn.Module):
    """The expert that every token visits; held by every expert rank (DeepSeekMoE, arXiv 2401.06066), and
    of its hidden size a share by each tensor rank. The layer sums those parts with its experts'."""

    def __init__(self, shared_hidden_size: int, hidden_size: int, activation: str, groups: Groups = SINGLE) -> None:
        super().__init__()
        self.activation, self.groups = activation, groups
        share = tensor_share(shared_hidden_size, groups)
        self.up = nn.Linear(hidden_size, ACTIVATIONS[activation].width * share, bias=False)
        self.down = nn.Linear(share, hidden_size, bias=False)
        for layer in (self.up, self.down):
            mark_cut(layer.get_parameter("weight"), groups)

    def placements(self) -> dict[str, Placement]:
        blocks = ACTIVATIONS[self.activation].width
        return {"up.weight": tensor_cut(0, self.groups, blocks), "down.weight": tensor_cut(1, self.groups)}

    def forward(self, x_nD: Tensor) -> Tensor:
        """[n, D] -> this tensor rank's part of [n, D]."""
        return self.down(ACTIVATIONS[self.activation].forward(self.up(x_nD)))


def make_experts(config: MoEConfig, hidden_size: int, groups: Groups) -> Experts | ExpertGroups:
    """This rank's share of every expert group."""
    stacks = [
        Experts(
            groups.local_experts(group.num_experts),
            hidden_size,
            group.expert_hidden_size or config.expert_hidden_size,
            config.activation,
            config.expert_backend,
            groups,
        )
        for group in config.groups
    ]
    return stacks[0] if len(stacks) == 1 else ExpertGroups(stacks)


def slot_of_expert(config: MoEConfig, ranks: int) -> Tensor:
    """[router outputs]: the place of each expert in the order (rank, index on that rank).

    An expert without computation lives nowhere: its slot is ``num_experts``. Raises ValueError where
    a group does not divide among the ranks.
    """
    slots, before, per_rank = [], 0, config.num_experts // ranks
    for group in config.groups:
        if group.num_experts % ranks:
            raise ValueError(
                f"moe.expert_groups: a group of {group.num_experts} experts does not spread over "
                f"parallel.expert_parallel_size {ranks}; use a multiple of {ranks} in each group"
            )
        index = torch.arange(group.num_experts)
        share = group.num_experts // ranks
        slots.append(index // share * per_rank + before + index % share)
        before += share
    nowhere = torch.full((config.router_outputs - config.num_experts,), config.num_experts)
    return torch.cat([*slots, nowhere])
