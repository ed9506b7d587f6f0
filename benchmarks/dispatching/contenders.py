"""Who takes part: dispatch and combine around experts that cost next to nothing.

Expert e multiplies by 1 + e / E, which is enough for its router to have a gradient. Each takes tokens
[T, D] and router logits [T, E], chooses K experts as its library does (softmax, the K largest, divided
by their sum), moves the tokens, weighs them and brings them back: [T, D]. All of it but the experts is
the libraries' own code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.start_deepspeed import prepare_deepspeed
from benchmarks.layer.peers import as_on_cpu
from mmmoe_pretrain.engines import megatron as megatron_engine
from mmmoe_pretrain.moe.dispatch import AllToAllDispatcher
from mmmoe_pretrain.moe.plan import ExpertPlan, sum_rows, take_rows
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.runtime import silence_megatron

OURS, MEGATRON, DEEPSPEED, DEEPSPEED_DROPS = "ours", "megatron", "deepspeed", "deepspeed, drops"
LOSSY = (DEEPSPEED_DROPS,)  # these lose tokens, so their results differ
Contender = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """T tokens a rank of hidden size D; K of E experts each. ``skewed``: the e-th expert of all is
    about 1 / e as likely as the first (Zipf), so most tokens go to the first rank."""

    tokens: int
    hidden_size: int
    experts: int
    top_k: int
    skewed: bool

    @property
    def name(self) -> str:
        return f"K{self.top_k} {'skewed' if self.skewed else 'balanced'}"

    def factors(self, local: range) -> Tensor:
        """What some experts multiply by."""
        return 1 + torch.arange(local.start, local.stop) / self.experts

    def inputs(self, rank: int) -> tuple[Tensor, Tensor]:
        """Tokens [T, D] and logits [T, E] of a rank."""
        generator = torch.Generator().manual_seed(rank)
        x_TD = torch.randn(self.tokens, self.hidden_size, generator=generator)
        logits_TE = torch.randn(self.tokens, self.experts, generator=generator)
        if self.skewed:
            logits_TE -= torch.arange(1.0, self.experts + 1).log()
        return x_TD.requires_grad_(), logits_TE.requires_grad_()


def ours(task: Task, groups: Groups) -> Contender:
    """``AllToAllDispatcher`` in one chunk."""
    dispatcher = AllToAllDispatcher(task.experts, groups)
    factors = task.factors(groups.local_experts(task.experts))

    def weigh(x_mD: Tensor, weights_A: Tensor, plan: ExpertPlan) -> Tensor:
        factors_A = factors.repeat_interleave(torch.tensor(plan.counts))
        return sum_rows(take_rows(x_mD, plan) * (weights_A * factors_A)[:, None], plan)

    def run(x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(task.top_k)
        return dispatcher.run(x_TD, ids_TK, weights_TK / weights_TK.sum(-1, keepdim=True), weigh)[0]

    return run


def megatron(task: Task, groups: Groups) -> Contender:
    """megatron-core's MoEAlltoAllTokenDispatcher; on a CPU through the stand-in for CUDA."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import moe_utils, token_dispatcher
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not torch.cuda.is_available():
        token_dispatcher.maybe_move_tensor_to_cpu = as_on_cpu
    with silence_megatron():
        config = TransformerConfig(
            num_layers=1,
            hidden_size=task.hidden_size,
            num_attention_heads=1,
            num_moe_experts=task.experts,
            moe_router_topk=task.top_k,
            moe_router_dtype="fp32",
            moe_token_dispatcher_type="alltoall",
            expert_model_parallel_size=groups.expert_size,
            use_cpu_initialization=True,
        )
    local = groups.local_experts(task.experts)
    factors = task.factors(local)
    pg = ProcessGroupCollection.use_mpu_process_groups()
    dispatcher = token_dispatcher.MoEAlltoAllTokenDispatcher(len(local), list(local), config, pg)

    def run(x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        probs_TE, map_TE = moe_utils.topk_routing_with_score_function(logits_TE, task.top_k)
        sent = dispatcher.dispatch_preprocess(x_TD, map_TE, probs_TE)
        rows, counts, weights = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*sent))
        rows = rows * (weights * factors.repeat_interleave(counts))[:, None]
        back = dispatcher.token_combine(dispatcher.combine_preprocess(rows))
        return dispatcher.combine_postprocess(back)

    return run


def deepspeed(task: Task, groups: Groups, drops: bool = False) -> Contender:
    """DeepSpeed's MOELayer with its top-k gating; the experts' room is that of the fullest expert of
    all ranks, or T K / E a rank where it ``drops`` tokens."""
    from deepspeed.moe.sharded_moe import MOELayer, topkgating

    class Gate(nn.Module):
        """TopKGate without its matrix: the task brings the logits."""

        logits_TE: Tensor

        def forward(self, x: Tensor, used_token: object, sparse_routes: bool, use_tutel: bool) -> Any:
            return topkgating(
                self.logits_TE,
                task.top_k,
                capacity_factor=1.0,
                min_capacity=1,
                drop_tokens=drops,
                ep_group=groups.expert,
                sparse_routes=sparse_routes,
            )

        def _set_ep_group(self, group: object) -> None: ...

    class Multiply(nn.Module):
        """[ranks, L, C, D]: the experts."""

        def forward(self, x: Tensor) -> Tensor:
            return x * factors[:, None, None]

    gate, local = Gate(), groups.local_experts(task.experts)
    factors = task.factors(local)
    layer = MOELayer(gate, Multiply(), "benchmark", groups.expert_size, len(local))
    layer._set_ep_group(groups.expert)

    def run(x_TD: Tensor, logits_TE: Tensor) -> Tensor:
        gate.logits_TE = logits_TE
        return layer(x_TD, None)

    return run


def deepspeed_with_drops(task: Task, groups: Groups) -> Contender:
    """DeepSpeed at a capacity factor of 1."""
    return deepspeed(task, groups, drops=True)


def available() -> dict[str, Callable[[Task, Groups], Contender]]:
    """Imports what is installed, once, before ranks are forked; says what is not."""
    megatron_engine.prepare()
    found: dict[str, Callable[[Task, Groups], Contender]] = {OURS: ours, MEGATRON: megatron}
    if not prepare_deepspeed():
        return found
    return {**found, DEEPSPEED: deepspeed, DEEPSPEED_DROPS: deepspeed_with_drops}
