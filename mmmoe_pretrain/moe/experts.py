"""Experts: the stacked weights of this rank, and on which rank each expert of the layer is.

Has the parameters, their placement and the choice of the backend (``expert_math.py``, ``cpu/``), without routing and
communication. Experts of different sizes (``moe.expert_groups``) form one stack a group; every expert rank holds an
equal share of every group. Tensor ranks hold a share of each expert's hidden size, so that their results are parts of
a sum.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.moe.activation import ACTIVATIONS
from mmmoe_pretrain.moe.cpu.blocked import blocked
from mmmoe_pretrain.moe.cpu.buffers import Buffers
from mmmoe_pretrain.moe.expert_math import ExpertMath, ExpertStack, grouped_mm, grouped_mm_fits
from mmmoe_pretrain.moe.lending import Loans, keep_in_graph
from mmmoe_pretrain.moe.plan import ExpertPlan, sum_rows, take_rows, zero_unused_
from mmmoe_pretrain.parallel.cuts import expert_cut, mark_cut, mark_stacked, tensor_cut, tensor_share
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.placement import Placement
from mmmoe_pretrain.parallel.tensor import sum_gradients

EXPERT_BACKENDS: dict[str, ExpertMath] = {"blocked": blocked, "grouped_mm": grouped_mm}


def choose_backend(name: str, x_mD: Tensor, plan: ExpertPlan, stack: ExpertStack) -> ExpertMath:
    """``auto``: grouped products on a GPU, blocks on a CPU. Blocks wherever grouped products do not fit."""
    wants_grouped = name == "grouped_mm" or (name == "auto" and x_mD.device.type != "cpu")
    return grouped_mm if wants_grouped and grouped_mm_fits(x_mD, plan, stack) else blocked


class Experts(nn.Module):
    """A stack of equal experts; ``local_experts`` are their indices within their group.

    ``up``: [E_local, F, D], or [E_local, 2F, D] with the gate before the up projection (SwiGLU).
    ``down``: [E_local, D, F]; F is this tensor rank's share. Each expert has the layout of ``nn.Linear``.
    ``up_bias`` and ``down_bias``, if ``config.expert_biases``: [E_local, F or 2F], [E_local, D]; of D, too, a
    tensor rank has a share, since the ranks' results are summed. All are marked so that the engines reduce
    their gradients only over the replicas of the expert. ``weight_on_input``: y = expert(w x), not w expert(x).
    """

    def __init__(
        self,
        local_experts: range,
        hidden_size: int,
        expert_hidden_size: int,
        config: MoEConfig,
        groups: Groups = SINGLE,
    ) -> None:
        super().__init__()
        count, share = len(local_experts), tensor_share(expert_hidden_size, groups)
        width = ACTIVATIONS[config.activation].width * share
        self._memory = Buffers()
        self.local_experts, self.groups = local_experts, groups
        self.activation, self.backend = config.activation, config.expert_backend
        self.weight_on_input = config.router_weight_on_input
        self.recompute = False  # True: the backward pass computes the activations again
        self.output_is_needed = True  # not where a block is computed again (models/trunk.py)
        self.cpu_config = CpuConfig()  # models/trunk.set_cpu
        self.up = nn.Parameter(torch.empty(count, width, hidden_size))
        self.down = nn.Parameter(torch.empty(count, hidden_size, share))
        self.up_bias: nn.Parameter | None = None
        self.down_bias: nn.Parameter | None = None
        if config.expert_biases:
            self.up_bias = nn.Parameter(torch.zeros(count, width))
            self.down_bias = nn.Parameter(torch.zeros(count, tensor_share(hidden_size, groups)))
        self._mark()

    def _mark(self) -> None:
        for weight in self.parameters():
            weight.allreduce = False  # type: ignore[attr-defined]  # megatron-core's mark of an expert
            mark_cut(weight, self.groups)
            mark_stacked(weight)

    def placements(self) -> dict[str, Placement]:
        experts, blocks = expert_cut(self.groups), (1,) * ACTIVATIONS[self.activation].width
        wide = (*experts, *tensor_cut(1, self.groups, blocks))
        found = {"up": wide, "down": (*experts, *tensor_cut(2, self.groups))}
        if self.down_bias is not None:
            found |= {"up_bias": wide, "down_bias": (*experts, *tensor_cut(1, self.groups))}
        return found

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()  # copy.deepcopy drops the attributes of a parameter

    def forward(self, x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan, loans: Loans | None = None) -> Tensor:
        """[m, D] -> [m, D]: each row's experts, weighted and summed. ``loans``: experts that this rank lends and
        borrows; the plan then has the borrowed ones after its own. Their weights arrive while its own compute."""
        stacks: list[Tensor] = [self.up, self.down]
        if self.up_bias is not None and self.down_bias is not None:
            stacks += [self.up_bias, self.down_bias]
        if loans is None:
            return self._experts(x_mD, weights_A, plan, stacks)
        stacks, arriving = loans.start(stacks)
        if not loans.num_borrowed:
            y_mD = self._experts(x_mD, weights_A, plan, stacks)
            return keep_in_graph(y_mD, [transfer.wait() for transfer in arriving])
        own, borrowed = (plan.counts[part] for part in (slice(len(self.up)), slice(len(self.up), None)))
        split, end = sum(own), plan.num_assignments
        y_mD = self._experts(x_mD, weights_A[:split], plan.part(0, split, own), stacks)
        stacks = [transfer.wait() for transfer in arriving]
        return y_mD + self._experts(x_mD, weights_A[split:], plan.part(split, end, borrowed), stacks)

    def _experts(self, x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan, stacks: list[Tensor]) -> Tensor:
        """By these experts: ``up``, ``down`` and, if there are any, their biases."""
        if not self.weight_on_input:
            return self._weighted_sum(x_mD, weights_A, plan, *stacks)
        x_AD = take_rows(x_mD, plan) * weights_A[:, None].to(x_mD.dtype)
        ones_A = zero_unused_(torch.ones_like(weights_A), plan)  # an assignment to nowhere adds no bias
        return sum_rows(self._weighted_sum(x_AD, ones_A, plan.one_by_one(), *stacks), plan)

    def _weighted_sum(
        self, x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan, up: Tensor, down: Tensor,
        up_bias: Tensor | None = None, down_bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        stack = ExpertStack(
            up, down, self.activation, up_bias, self.recompute, self.output_is_needed, self._memory, self.cpu_config
        )
        y_mD = choose_backend(self.backend, x_mD, plan, stack)(x_mD, weights_A, plan, stack)
        return y_mD if down_bias is None else y_mD + self._down_biases(weights_A, plan, down_bias).to(y_mD.dtype)

    def _down_biases(self, weights_A: Tensor, plan: ExpertPlan, down_bias: Tensor) -> Tensor:
        """[m, D]: the sum of w b_e over each row's experts, 0 outside this tensor rank's share of D. Uses a gather,
        so that a row's gradient reaches only its own experts (0 times NaN is NaN)."""
        weights = weights_A.to(down_bias.dtype)[plan.place_A]
        experts = plan.experts_A[plan.place_A]
        share = F.embedding_bag(experts, down_bias, plan.offsets_m, mode="sum", per_sample_weights=weights)
        width, rank = down_bias.shape[1], self.groups.tensor_rank
        return F.pad(share, (rank * width, (self.groups.tensor_size - rank - 1) * width))


class ExpertGroups(nn.Module):
    """Stacks of different sizes, one after another; the plan counts their experts in that order."""

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
    """The expert of every token; held by every expert rank (DeepSeekMoE, arXiv 2401.06066), and
    of its hidden size a share by each tensor rank. The layer sums those parts with its experts'.
    With ``shared_expert_gate`` the output times sigmoid(w x), w of ``gate`` (Qwen2-MoE)."""

    def __init__(self, config: MoEConfig, hidden_size: int, groups: Groups = SINGLE) -> None:
        super().__init__()
        self.activation, self.groups = config.activation, groups
        share = tensor_share(config.shared_expert_hidden_size, groups)
        self.up = nn.Linear(hidden_size, ACTIVATIONS[config.activation].width * share, bias=False)
        self.down = nn.Linear(share, hidden_size, bias=False)
        gated = config.shared_expert_gate
        self.gate = nn.Linear(hidden_size, 1, bias=False) if gated else None  # whole on every tensor rank
        for layer in (self.up, self.down):
            mark_cut(layer.get_parameter("weight"), groups)

    def placements(self) -> dict[str, Placement]:
        blocks = (1,) * ACTIVATIONS[self.activation].width
        return {"up.weight": tensor_cut(0, self.groups, blocks), "down.weight": tensor_cut(1, self.groups)}

    def forward(self, x_nD: Tensor, alike_nD: Tensor) -> Tensor:
        """[n, D] -> this tensor rank's part of [n, D]. The two are those of ``tensor.enter_parts``."""
        y_nD = self.down(ACTIVATIONS[self.activation].forward(self.up(x_nD)))
        if self.gate is None:
            return y_nD
        return sum_gradients(torch.sigmoid(self.gate(alike_nD)), self.groups) * y_nD


def make_experts(config: MoEConfig, hidden_size: int, groups: Groups) -> Experts | ExpertGroups:
    """This rank's share of every expert group."""
    stacks = []
    for group in config.groups:
        size, local = group.expert_hidden_size or config.expert_hidden_size, groups.local_experts(group.num_experts)
        stacks.append(Experts(local, hidden_size, size, config, groups))
    return stacks[0] if len(stacks) == 1 else ExpertGroups(stacks)


def slot_of_expert(config: MoEConfig, ranks: int) -> Tensor:
    """[router outputs]: the position of each expert in the order (rank, index on that rank).

    An expert without computation is on no rank: its slot is ``num_experts``. Raises ValueError where
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
