"""Activations that are computed again in the backward pass instead of being kept (arXiv 1604.06174).

``experts``: the widest activations of an MoE layer, inside the experts alone (``moe/expert_math.py``).
``blocks``: of each block of the trunk its input alone is kept.

A block may be run twice because it is a function of its input, its parameters and the plan: the noise of
a router is drawn from (seed, ``TokenInfo.draw``), so no state of a generator is put back.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmmoe_pretrain.models.attention import StreamPlan
from mmmoe_pretrain.models.block import Block
from mmmoe_pretrain.moe.experts import Experts
from mmmoe_pretrain.moe.stats import RoutingStats


def run_block(block: Block, x_nD: Tensor, plan: StreamPlan, recompute: bool) -> tuple[Tensor, RoutingStats | None]:
    """``block(x_nD, plan)``; with ``recompute`` its backward pass runs it again before all else.

    Ranks repeat the block's communication in the order of the forward pass. It is run to its end, though
    its last sums are not needed again: an exchange that was begun is waited for, and hooks that gather
    parameters before a module let them go after it (ZeRO-3).
    """
    if not recompute:
        return block(x_nD, plan)
    return checkpoint(block, x_nD, plan, use_reentrant=False, preserve_rng_state=False, early_stop=False)


def recompute_experts(model: nn.Module) -> None:
    """Let every stack of experts in ``model`` compute its activations again."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.recompute = True
