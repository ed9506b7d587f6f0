"""The trunk: the blocks that all modalities and tasks share, or those of one pipeline stage; and settings of how its
modules compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmmoe_pretrain.config import ModelConfig, MoEConfig
from mmmoe_pretrain.config.base import StreamNames
from mmmoe_pretrain.config.train import CpuConfig
from mmmoe_pretrain.models.attention import StreamPlan
from mmmoe_pretrain.models.block import Block, RMSNorm, memory_size, split_memory
from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.moe.layer import MoELayer
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.moe.stats import RoutingStats
from mmmoe_pretrain.parallel.groups import Groups
from mmmoe_pretrain.parallel.stages import Stage
from mmmoe_pretrain.parallel.tensor import enter_trunk, leave_trunk


class Trunk(nn.Module):
    """The blocks of ``stage`` under their numbers in the whole trunk, and on the last stage a last
    normalisation. Between the blocks a tensor rank holds all tokens, or under sequence parallelism its
    share of them; the first stage cuts them and the last one puts them together."""

    def __init__(self, model: ModelConfig, moe: MoEConfig, groups: Groups, stage: Stage, names: StreamNames) -> None:
        super().__init__()
        self.groups, self.stage = groups, stage
        self.memory_size = memory_size(moe)
        self.recompute = False
        # An exchange that began has to be waited for, by all ranks.
        self.stop_early = groups.expert_size == groups.tensor_size == 1
        self.blocks = nn.ModuleDict({str(i): Block(model, moe, i, groups, names) for i in stage.blocks})
        self.norm = RMSNorm(model.hidden_size, groups) if stage.last else None

    def forward(self, x_nD: Tensor, plan: StreamPlan) -> tuple[Tensor, tuple[RoutingStats, ...]]:
        """[n, D] -> ([n, D], routing sums of each sparse block); n tokens, or this tensor rank's share. Between
        stages a row also has the routing memory, which begins with zeros."""
        if self.stage.first:
            x_nD = enter_trunk(x_nD, self.groups)
            if self.memory_size:
                x_nD = F.pad(x_nD, (0, self.memory_size))
        routing = []
        for index, block in zip(self.stage.blocks, self.blocks.values(), strict=True):
            if self.recompute and index in self.stage.recomputed and torch.is_grad_enabled():
                x_nD, stats = checkpoint(
                    block, x_nD, plan, use_reentrant=False, preserve_rng_state=False, early_stop=self.stop_early,
                    context_fn=partial(_contexts, block),
                )  # fmt: skip
            else:
                x_nD, stats = block(x_nD, plan)
            if stats is not None:
                routing.append(stats)
        if self.norm is not None:
            x_nD, _ = split_memory(x_nD, self.memory_size)
            x_nD = leave_trunk(self.norm(x_nD), plan.num_valid, self.groups)
        return x_nD, tuple(routing)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of a block's forward pass, and of the pass that computes it again."""
    return nullcontext(), _recomputing(block)


@contextmanager
def _recomputing(block: nn.Module) -> Iterator[None]:
    """While a block is computed again for what its backward pass needs, which is not its output. Attention among
    experts needs theirs."""
    ffn = block.get_submodule("ffn")
    read = isinstance(ffn, MoELayer) and ffn.expert_attention is not None
    stacks = [module for module in block.modules() if isinstance(module, Experts) and not read]
    for experts in stacks:
        experts.output_is_needed = False
    try:
        yield
    finally:
        for experts in stacks:
            experts.output_is_needed = True


def set_recompute(model: nn.Module, mode: str, hooks_after_modules: bool = False) -> None:
    """Choose what the backward pass computes again instead of keeping it (arXiv 1604.06174).

    ``experts``: the widest activations of an MoE layer (``moe/expert_math.py``). ``blocks``: all of a block but its
    input, in all blocks but the last (``Stage.recomputed``); the ranks repeat its communication in the order of the
    forward pass. It may run twice because it is a function of its input, its parameters and the plan: noise of a
    router is drawn from (seed, ``TokenInfo.draw``). It stops where the last kept tensor has been made, unless ranks
    exchange rows or ``hooks_after_modules`` have to run: those of ZeRO-3 release there what they gathered before.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            module.recompute = mode == "experts"
        elif isinstance(module, Trunk):
            module.recompute = mode == "blocks"
            module.stop_early = module.stop_early and not hooks_after_modules


def set_cpu(model: nn.Module, settings: CpuConfig) -> None:
    """Choose how experts and routers multiply on a CPU (``train.cpu``)."""
    for module in model.modules():
        if isinstance(module, Experts | Router):
            module.cpu_config = settings
