"""A small trunk by itself, its inputs, and its losses and gradients."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mmmoe_pretrain.config import ModelConfig
from mmmoe_pretrain.config.moe import MoEConfig
from mmmoe_pretrain.models.attention import Rotary, StreamPlan, plan_stream
from mmmoe_pretrain.models.trunk import Trunk, set_recompute
from mmmoe_pretrain.moe.router import Router
from mmmoe_pretrain.parallel.groups import SINGLE, Groups
from mmmoe_pretrain.parallel.stages import Stage
from tests.moe.routing_inputs import NAMES
from tests.support import random_batch, tiny_config

MODEL = ModelConfig(hidden_size=16, num_layers=3, num_heads=2, ffn_hidden_size=24)
D, FF, EXPERTS = 16, 40, 4


class Stack(Trunk):
    """A dense, a sparse and a dense block, without the last normalisation."""

    def __init__(self, groups: Groups = SINGLE, **settings: object) -> None:
        moe = MoEConfig(**{"num_experts": EXPERTS, "expert_hidden_size": FF, "every": 2, **settings})
        super().__init__(MODEL, moe, groups, Stage(0, 3, first=True, last=False), NAMES)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5

    def loss(self, x_nD: Tensor, plan: StreamPlan) -> Tensor:
        """Of the hidden states and of every sum of routing that has a gradient."""
        out_nW, routing = self(x_nD, plan)
        flat = torch.cat([part for stats in routing for part in (stats.flatten(), stats.orthogonality[None])])
        weights_W = torch.linspace(-1, 1, out_nW.shape[1])
        return (flat * torch.linspace(-1, 1, flat.numel())).sum() + (out_nW * weights_W).square().sum()


def make_input(root: Path, draw: int = 0, seed: int = 0, samples: int = 6) -> tuple[Tensor, StreamPlan]:
    batch = random_batch(tiny_config(root), ["iat", "it", "a", "t", "ia", "at"][:samples], seed=seed)
    rotary = Rotary(D // MODEL.num_heads, MODEL.rotary_base, torch.tensor([False, True, True]))
    plan = plan_stream(batch, NAMES, rotary, draw)
    x_nD = torch.randn(plan.num_valid, D, generator=torch.Generator().manual_seed(seed))
    return x_nD.requires_grad_(), plan


def outcome(stack: Stack, mode: str, inputs: list[tuple[Tensor, StreamPlan]]) -> list[Tensor]:
    """Losses of the microbatches, and all gradients, with this kind of recomputation; forward passes first, as
    pipelining has them."""
    set_recompute(stack, mode)
    leaves = [*(x_nD for x_nD, _ in inputs), *stack.parameters()]
    for module in stack.modules():
        if isinstance(module, Router):
            module.begin_step(7)
    losses = [stack.loss(x_nD, plan) for x_nD, plan in inputs]
    return [*(loss.detach() for loss in losses), *torch.autograd.grad(losses, leaves)]
